"""Measures how two models differ over the samples. `verdict` judges the figures."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from microvlm.bench.equivalence.samples import CAPTION
from microvlm.bench.equivalence.transcripts import Answer, EpisodeTrace
from microvlm.bench.stats import kl_divergence, log_softmax, max_abs
from microvlm.exporters.replay.differences import Differences


@dataclass
class Agreement:
    """Answers and logits of two runs of the same samples."""

    samples: int = 0
    equal: int = 0
    """Samples whose greedy choices are all the same."""
    positions: int = 0
    top1_equal: int = 0
    top5_shared: list[float] = field(default_factory=list)
    """Share of the five likeliest tokens that both have, by position."""
    probability_changes: list[float] = field(default_factory=list)
    """Candidate's minus reference's probability of the reference's likeliest token, by position."""
    margins: list[float] = field(default_factory=list)
    """Distance of the reference's two largest logits, by position: a near-tie has a small one."""
    flipped_margins: list[float] = field(default_factory=list)
    """Those of the positions where the likeliest token differs."""
    kl: list[float] = field(default_factory=list)
    logits_max_abs_diff: float = 0.0
    changed: list[str] = field(default_factory=list)
    """Names of samples whose answer differs."""

    def add_answers(self, name: str, reference: Answer, candidate: Answer) -> None:
        self.samples += 1
        same = reference.choices == candidate.choices
        self.equal += same
        if not same:
            self.changed.append(name)

    def add_logits(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """float32 [n, V] of both at the same positions."""
        self.positions += len(reference)
        likeliest = reference.argmax(-1)
        flipped = likeliest != candidate.argmax(-1)
        self.top1_equal += int((~flipped).sum())
        two = np.sort(reference.astype(np.float64), -1)[:, -2:]
        margins = two[:, 1] - two[:, 0]
        self.margins += margins.tolist()
        self.flipped_margins += margins[flipped].tolist()
        self.top5_shared += _shared_top(reference, candidate, 5)
        change = np.exp(log_softmax(candidate)) - np.exp(log_softmax(reference))
        self.probability_changes += np.take_along_axis(change, likeliest[:, None], -1)[:, 0].tolist()
        self.kl += [float(value) for value in kl_divergence(reference, candidate)]
        self.logits_max_abs_diff = max(self.logits_max_abs_diff, max_abs(reference, candidate))

    @property
    def greedy_match(self) -> float:
        return self.equal / self.samples if self.samples else 1.0

    @property
    def top1_agreement(self) -> float:
        return self.top1_equal / self.positions if self.positions else 1.0

    @property
    def top5_agreement(self) -> float:
        return float(np.mean(self.top5_shared)) if self.top5_shared else 1.0

    @property
    def probability_change_rms(self) -> float:
        """Root mean square of `probability_changes`, as llama-perplexity reports it of the right token."""
        return (
            float(np.sqrt(np.mean(np.square(self.probability_changes)))) if self.probability_changes else 0.0
        )

    @property
    def kl_mean(self) -> float:
        return float(np.mean(self.kl)) if self.kl else 0.0


def _shared_top(reference: np.ndarray, candidate: np.ndarray, count: int) -> list[float]:
    """Share of the `count` likeliest tokens that both have; float32 [n, V] -> n values."""
    kept = min(count, reference.shape[-1])
    tops = (np.argsort(-logits, -1, kind="stable")[:, :kept] for logits in (reference, candidate))
    return [
        len(set(ours) & set(theirs)) / kept
        for ours, theirs in zip(*map(np.ndarray.tolist, tops), strict=True)
    ]


@dataclass
class Drift:
    """Largest differences over an episode's writes, readings and forgets."""

    mean: float = 0.0
    """|dM| after the writes."""
    covariance: float = 0.0
    """|dU| after the writes."""
    latent: float = 0.0
    reading: float = 0.0
    scope: float = 0.0
    slot: float = 0.0
    """Largest difference of the keys and values from W_M."""
    forgotten: float = 0.0
    """|dM| and |dU| after the forgets."""
    by_write: list[float] = field(default_factory=list)
    """|dM| after each write."""

    @classmethod
    def between(cls, reference: EpisodeTrace, candidate: EpisodeTrace) -> Drift:
        def largest(parts: str) -> float:
            pairs = zip(getattr(reference, parts), getattr(candidate, parts), strict=True)
            return max(max_abs(np.asarray(ours), np.asarray(theirs)) for ours, theirs in pairs)

        states = list(zip(reference.states, candidate.states, strict=True))
        forgotten = zip(reference.forgotten, candidate.forgotten, strict=True)
        by_write = [max_abs(ours.mean, theirs.mean) for ours, theirs in states]
        return cls(
            mean=max(by_write),
            covariance=max(max_abs(ours.covariance, theirs.covariance) for ours, theirs in states),
            latent=largest("latents"),
            reading=largest("readings"),
            scope=largest("scopes"),
            slot=largest("slots"),
            forgotten=max(max_abs(a, b) for pair in forgotten for a, b in zip(*pair, strict=True)),
            by_write=by_write,
        )

    @property
    def largest(self) -> float:
        """The largest of all but `forgotten`, whose noise is of another size."""
        return max(self.mean, self.covariance, self.latent, self.reading, self.scope, self.slot)


@dataclass
class Scores:
    """Whether the answers of both models to the same samples are right (exact match)."""

    kinds: list[str] = field(default_factory=list)
    reference: list[bool] = field(default_factory=list)
    candidate: list[bool] = field(default_factory=list)

    def add(self, kind: str, right: str, reference: Answer, candidate: Answer) -> None:
        self.kinds.append(kind)
        self.reference.append(reference.text == right)
        self.candidate.append(candidate.text == right)

    def by_kind(self) -> dict[str, dict[str, float | int]]:
        table: dict[str, dict[str, float | int]] = {}
        for kind in sorted(set(self.kinds), key=lambda name: (name != CAPTION, name)):
            rows = [index for index, name in enumerate(self.kinds) if name == kind]
            table[kind] = {
                "samples": len(rows),
                "reference": sum(self.reference[row] for row in rows) / len(rows),
                "candidate": sum(self.candidate[row] for row in rows) / len(rows),
            }
        return table


@dataclass(frozen=True)
class Example:
    """Answers of both models to one picture."""

    picture: str
    prompt: str
    right: str
    reference: str
    candidate: str


@dataclass
class Metrics:
    """Everything measured. `replayed` and `differences` are None where nothing can be replayed."""

    free: Agreement = field(default_factory=Agreement)
    """Greedy answers of both, and logits teacher-forced on the reference's tokens."""
    scores: Scores = field(default_factory=Scores)
    drift: Drift = field(default_factory=Drift)
    examples: list[Example] = field(default_factory=list)
    """The first pictures with their captions."""
    replayed: Agreement | None = None
    differences: Differences | None = None
    replayed_drift: Drift | None = None
    replay_unavailable: str | None = None
