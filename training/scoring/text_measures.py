"""How much an answer says what people said: exact match, shared words, BLEU-4 and CIDEr-D, with bootstrap intervals.

A measure keeps a row of numbers for each item and says how the score follows from their sums, so that a bootstrap
over items resamples rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from microvlm.bench.stats import Interval, bootstrap
from microvlm.training.scoring.cider import cider_d

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Kana and Han characters, which are written without blanks: each counts as a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:'[^\W{_UNSPACED}]+)*")
_ORDERS = 4


class Measure(NamedTuple):
    """A score of n items."""

    rows: np.ndarray
    """float64 [n, S]"""
    value: Callable[[np.ndarray], float]
    """The score of sums [S] of rows."""

    def interval(self) -> Interval:
        """The score with its 95 % bootstrap interval over items."""
        return bootstrap(lambda rows: self.value(rows.sum(0)), self.rows)

    def minus(self, other: Measure) -> Interval:
        """This score minus that of another model on the same items, which are resampled in pairs."""
        columns = self.rows.shape[1]
        pairs = np.concatenate([self.rows, other.rows], 1)
        return bootstrap(
            lambda rows: self.value(rows[:, :columns].sum(0)) - other.value(rows[:, columns:].sum(0)), pairs
        )


def ratio(sums: np.ndarray) -> float:
    """The first sum over the second."""
    return float(sums[0] / sums[1])


def mean_of(values: Sequence[float] | np.ndarray, groups: Sequence[str] | None = None) -> Measure:
    """The mean of values. Those of one group, such as the questions about one picture, are resampled together."""
    pairs = np.stack([np.asarray(values, np.float64), np.ones(len(values))], 1)
    if groups is None:
        return Measure(pairs, ratio)
    places = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    rows = np.zeros((len(places), 2))
    np.add.at(rows, [places[group] for group in groups], pairs)
    return Measure(rows, ratio)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; a text without words is its own one word."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return _WORD.findall(plain) or plain.split()


def is_exact(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer has the words of one of the references, in their order."""
    words = words_of(answer)
    return any(words == words_of(reference) for reference in references)


def word_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, with the reference where it is best (Rajpurkar et al. 2016)."""
    words = Counter(words_of(answer))
    best = 0.0
    for reference in references:
        expected = Counter(words_of(reference))
        both = sum((words & expected).values())
        total = words.total() + expected.total()
        best = max(best, 2 * both / total if total else 0.0)
    return best


def answer_measures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """`exact_match`, `word_f1` and `bleu4`, each 0 to 1, and `cider_d`, 0 to 10, which needs two items or more."""
    pairs = list(zip(answers, references, strict=True))
    measures = {
        "exact_match": mean_of([is_exact(*pair) for pair in pairs]),
        "word_f1": mean_of([word_f1(*pair) for pair in pairs]),
        "bleu4": _bleu4(pairs),
    }
    if len(pairs) > 1:
        measures["cider_d"] = mean_of(
            cider_d([words_of(a) for a in answers], [[words_of(r) for r in group] for group in references])
        )
    return measures


def _bleu4(pairs: Sequence[tuple[str, Sequence[str]]]) -> Measure:
    """BLEU of up to four words of all answers together, unsmoothed (Papineni et al. 2002)."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="none", smooth_method="none")

    def score(sums: np.ndarray) -> float:
        counts = [int(number) for number in sums]
        return (
            BLEU.compute_bleu(counts[2 : 2 + _ORDERS], counts[2 + _ORDERS :], counts[0], counts[1]).score
            / 100
        )

    rows = []
    for answer, references in pairs:
        joined = [" ".join(words_of(reference)) for reference in references]
        sentence = metric.corpus_score([" ".join(words_of(answer))], [[reference] for reference in joined])
        rows.append([sentence.sys_len, sentence.ref_len, *sentence.counts, *sentence.totals])
    return Measure(np.array(rows, np.float64), score)
