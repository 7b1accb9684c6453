"""The likeliest answers to one prompt, by best-first search over their beginnings. Knows no tokenizer.

The log probability of the first tokens of an answer bounds that of the whole answer from above. So the search completes
the most probable beginnings that it has not followed yet, greedily and several at a time, until no open beginning is as
probable as the answers that it has, or its rounds are over. Caches are never reordered: a beginning is prefilled with
its prompt, which every backend can do.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from microvlm.generation import (
    GenerationOptions,
    Prompt,
    Timings,
    read_slot,
    speak_where_it_runs,
    teacher_force,
)
from microvlm.runtime import Memories, Runtime

WIDTH, ROUNDS = 4, 3
"""Beginnings that are completed together, and how often."""


class Completion(NamedTuple):
    """An answer that was followed to its end."""

    tokens: list[int]
    """Without the stop token."""
    log_probabilities: list[float]
    """Of every token, the stop token's last. Of a beginning, the first has the sum."""


def find_likeliest(
    runtime: Runtime,
    prompt: Prompt,
    options: GenerationOptions,
    memory: Memories | None,
    count: int,
    text_of: Callable[[list[int]], str],
    is_wanted: Callable[[str], bool] = lambda text: True,
    known: Completion | None = None,
    width: int = WIDTH,
    rounds: int = ROUNDS,
) -> list[tuple[str, float]]:
    """The `count` likeliest wanted answers to a prompt of batch 1, and their log probabilities, falling. `memory` is a
    single state, or the states of an episode.

    `known` is the greedy answer where it is known. Answers of the same text are one, with the likeliest's value.
    Options of sampling are not used. Raises UserError as the decode loop does.
    """
    options = dataclasses.replace(options, temperature=0.0)
    search = _Search(options, width)
    if known is not None:
        search.complete([(0.0, ())], [known], _force(runtime, prompt, memory, [known.tokens]))
    else:
        heapq.heappush(search.open, (0.0, ()))
    best: dict[str, float] = {}
    for _ in range(rounds if known is not None else rounds + 1):
        best = _by_text(search.answers, text_of, is_wanted)
        bar = sorted(best.values(), reverse=True)[count - 1] if len(best) >= count else -np.inf
        beginnings = search.take(bar)
        if not beginnings:
            break
        completions = _complete(runtime, prompt, options, memory, beginnings)
        forced = _force(runtime, prompt, memory, [completion.tokens for completion in completions])
        search.complete(beginnings, completions, forced)
    best = _by_text(search.answers, text_of, is_wanted)
    return sorted(best.items(), key=lambda item: -item[1])[:count]


Beginning = tuple[float, tuple[int, ...]]
"""Minus the log probability, and the tokens: the most probable is the smallest."""


class _Search:
    """What was found, and the beginnings that are still open."""

    def __init__(self, options: GenerationOptions, width: int):
        self.options, self.width = options, width
        self.answers: dict[tuple[int, ...], float] = {}
        self.open: list[Beginning] = []

    def take(self, bar: float) -> list[Beginning]:
        """Remove the most probable open beginnings that may become a likelier answer than `bar`."""
        taken: list[Beginning] = []
        while self.open and len(taken) < self.width and -self.open[0][0] > bar:
            taken.append(heapq.heappop(self.open))
        return taken

    def complete(
        self, beginnings: Sequence[Beginning], completions: Sequence[Completion], logits: np.ndarray
    ) -> None:
        """Enter the answers to which beginnings led, and open every other way that leaves them after the beginning.

        logits [B, n, V] are of the completions' tokens, with at least one position more than each has.
        """
        for (_, start), completion, row in zip(beginnings, completions, logits, strict=True):
            tokens = completion.tokens
            self._enter(tuple(tokens), sum(completion.log_probabilities))
            for step in range(len(start), min(len(tokens) + 1, self.options.max_new_tokens)):
                before = sum(completion.log_probabilities[:step])
                chosen = tokens[step] if step < len(tokens) else None
                self._leave(tuple(tokens[:step]), before, chosen, _log_softmax(row[step]))

    def _leave(
        self, tokens: tuple[int, ...], before: float, chosen: int | None, log_probabilities: np.ndarray
    ) -> None:
        """Open the most probable next tokens but `chosen` (None: a stop token)."""
        stops = self.options.stop_tokens or ()
        most = min(self.width + 1 + len(stops), len(log_probabilities))
        for token in np.argpartition(-log_probabilities, most - 1)[:most].tolist():
            value = before + float(log_probabilities[token])
            if token in stops:
                if chosen is not None:
                    self._enter(tokens, value)
            elif token != chosen:
                longer = (*tokens, token)
                if len(longer) == self.options.max_new_tokens:
                    self._enter(longer, value)
                else:
                    heapq.heappush(self.open, (-value, longer))

    def _enter(self, tokens: tuple[int, ...], value: float) -> None:
        self.answers[tokens] = max(value, self.answers.get(tokens, -np.inf))


def _complete(
    runtime: Runtime,
    prompt: Prompt,
    options: GenerationOptions,
    memory: Memories | None,
    beginnings: Sequence[Beginning],
) -> list[Completion]:
    """Follow beginnings greedily to their ends, together."""
    lengths = [len(tokens) for _, tokens in beginnings]
    batch, longest = len(beginnings), max(lengths)
    prompts = _repeat(prompt, batch)
    slot = read_slot(runtime, prompts, memory)
    width = prompt.inputs_embeds.shape[-1]
    embeds = np.zeros((batch, prompt.inputs_embeds.shape[1] + longest, width), np.float32)
    mask = np.zeros(embeds.shape[:2], np.int64)
    for row, (_, tokens) in enumerate(beginnings):
        # Padding is on the left of everything.
        parts = [prompt.inputs_embeds[0]]
        if tokens:
            parts.append(runtime.embed_tokens(np.array([tokens], np.int64))[0])
        joined = np.concatenate(parts)
        embeds[row, -len(joined) :] = joined
        mask[row, -len(joined) :] = [*prompt.attention_mask[0], *(1 for _ in tokens)]
    # Rows of longer beginnings may speak on beyond their limit, but not beyond the model's positions.
    room = runtime.config.text.max_position_embeddings - 1 - int(mask.sum(1).max())
    rest = dataclasses.replace(options, max_new_tokens=min(options.max_new_tokens - min(lengths), room))
    result = speak_where_it_runs(runtime, Prompt(embeds, mask), rest, slot, None, Timings())
    completions = []
    for row, (cost, tokens) in enumerate(beginnings):
        limit = options.max_new_tokens - len(tokens)
        values = result.log_probabilities[row][:limit]
        spoken = result.tokens[row][:limit]
        own = [-cost, *(0.0 for _ in tokens[1:])] if tokens else []
        completions.append(Completion([*tokens, *spoken], [*own, *values]))
    return completions


def _force(
    runtime: Runtime, prompt: Prompt, memory: Memories | None, rows: Sequence[Sequence[int]]
) -> np.ndarray:
    """Logits [B, n, V] of answers and of what may follow them, n one more than the longest answer has tokens."""
    answers = np.zeros((len(rows), max(map(len, rows)) + 1), np.int64)
    for row, tokens in enumerate(rows):
        answers[row, : len(tokens)] = tokens  # what is right of them, no earlier position sees
    prompts = _repeat(prompt, len(rows))
    slot = read_slot(runtime, prompts, memory)
    return teacher_force(runtime, prompts, answers, slot)


def _by_text(
    answers: dict[tuple[int, ...], float], text_of: Callable[[list[int]], str], wanted: Callable[[str], bool]
) -> dict[str, float]:
    best: dict[str, float] = {}
    for tokens, value in answers.items():
        text = text_of(list(tokens))
        if wanted(text):
            best[text] = max(value, best.get(text, -np.inf))
    return best


def _repeat(prompt: Prompt, batch: int) -> Prompt:
    return Prompt(np.repeat(prompt.inputs_embeds, batch, 0), np.repeat(prompt.attention_mask, batch, 0))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [V] -> float64 [V]."""
    below_best = logits.astype(np.float64) - float(logits.max())
    return below_best - np.log(np.exp(below_best).sum())
