"""What leaving something out of a model costs on samples: KL divergence, equal first choices, perplexity.

Two models are compared where both predict the text from the same place on. With fewer tokens the whole model's
distribution is that of the first token that the smaller tokenizer writes of each of its tokens: no other map makes the
two comparable, and with equal tokenizers it changes nothing. Perplexities are both a token of the whole tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from microvlm.exporters.smaller.samples import Sample
from microvlm.exporters.smaller.text_rows import Reader, Row, batches, picture_features


class TextCosts(NamedTuple):
    """Means over scored tokens."""

    kl: float
    """KL(whole || smaller), nats a token."""
    top1: float
    """Share of tokens with the same most probable one."""
    perplexity_before: float
    perplexity_after: float
    tokens: int
    """Tokens of the whole tokenizer that were scored."""
    tokens_after: int
    """Tokens of the smaller tokenizer for the same text."""
    texts: int


def compare(
    whole: Reader, smaller: Reader, samples: Sequence[Sample], first_token: Tensor | None = None
) -> TextCosts:
    """The costs of `smaller` on samples. `first_token` int64 [V]: where a token of `whole` begins in `smaller`."""
    features = picture_features(whole.model, whole.processor, samples)
    kl = same = shared = nats = nats_after = tokens = tokens_after = 0.0
    for part in batches(_numbered(samples)):
        rows = [whole.row(sample, picture) for sample, picture in part]
        after = [
            smaller.row(sample, picture, row.places[0])
            for (sample, picture), row in zip(part, rows, strict=True)
        ]
        kept = [(a, b) for a, b in zip(rows, after, strict=True) if b.scored]
        if not kept:
            continue
        rows, after = [a for a, _ in kept], [b for _, b in kept]
        target = whole.logits(rows, features).float().log_softmax(-1)
        guess = smaller.logits(after, features).float().log_softmax(-1)
        nats += _nats(target, rows)
        nats_after += _nats(guess, after)
        tokens += len(target)
        tokens_after += len(guess)
        ours, theirs = _common(rows, after)
        divergence, agreement = divergences(target[ours], guess[theirs], first_token)
        kl += float(divergence.sum())
        same += float(agreement.sum())
        shared += len(ours)
    return TextCosts(
        kl / max(shared, 1),
        same / max(shared, 1),
        _perplexity(nats, tokens),
        _perplexity(nats_after, tokens),
        int(tokens),
        int(tokens_after),
        len(samples),
    )


def divergences(target: Tensor, guess: Tensor, first_token: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log probabilities [n, V] and [n, v] -> KL(target || guess) in nats, and whether the largest is the same, [n]."""
    share = target.exp()
    if first_token is not None:
        share = share.new_zeros(guess.shape).index_add_(1, first_token, share)
        target = share.clamp(min=torch.finfo(share.dtype).tiny).log()
    return (share * (target - guess)).sum(-1), (share.argmax(-1) == guess.argmax(-1)).float()


def _numbered(samples: Sequence[Sample]) -> list[tuple[Sample, int | None]]:
    """Each sample with the index of its picture's features."""
    numbered: list[tuple[Sample, int | None]] = []
    pictures = 0
    for sample in samples:
        numbered.append((sample, None if sample.picture is None else pictures))
        pictures += sample.picture is not None
    return numbered


def _nats(log_probabilities: Tensor, rows: Sequence[Row]) -> float:
    labels = torch.tensor([row.ids[index] for row in rows for index in row.scored])
    return -float(log_probabilities.gather(1, labels[:, None]).double().sum())


def _common(rows: Sequence[Row], after: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Indices among the scored tokens of both models of those that begin at the same place of the same row."""
    theirs = {place: index for index, place in enumerate(_numbered_places(after))}
    pairs = [(index, theirs[place]) for index, place in enumerate(_numbered_places(rows)) if place in theirs]
    return [ours for ours, _ in pairs], [other for _, other in pairs]


def _numbered_places(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return [(number, place) for number, row in enumerate(rows) for place in row.places]


def _perplexity(nats: float, tokens: float) -> float:
    # Beyond e^40 nobody tells numbers apart, and JSON has no infinity.
    return float(torch.tensor(min(nats / max(tokens, 1), 40.0), dtype=torch.float64).exp())
