"""How two models differed over the samples, as plain figures. Decides nothing: `verdict` does."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from microvlm.bench.codes import Comparison
from microvlm.bench.runs import Answer, EpisodeTrace
from microvlm.bench.samples import CAPTION
from microvlm.bench.stats import kl_divergence, max_abs


@dataclass
class Agreement:
    """Answers and logits of two runs of the same samples."""

    samples: int = 0
    equal: int = 0
    """Samples whose greedy choices are all the same."""
    positions: int = 0
    top1_equal: int = 0
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
        self.top1_equal += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        self.kl += [float(value) for value in kl_divergence(reference, candidate)]
        self.logits_max_abs_diff = max(self.logits_max_abs_diff, max_abs(reference, candidate))

    @property
    def greedy_match(self) -> float:
        return self.equal / self.samples if self.samples else 1.0

    @property
    def top1_agreement(self) -> float:
        return self.top1_equal / self.positions if self.positions else 1.0

    @property
    def kl_mean(self) -> float:
        return float(np.mean(self.kl)) if self.kl else 0.0


@dataclass
class Drift:
    """Largest differences over an episode's writes, readings and forgets."""

    mean: float = 0.0
    """|dM|."""
    covariance: float = 0.0
    """|dU|."""
    code: float = 0.0
    reading: float = 0.0
    scope: float = 0.0
    slot: float = 0.0
    """Of W_M's keys and values."""
    by_write: list[float] = field(default_factory=list)
    """|dM| after each write and forget."""

    @classmethod
    def between(cls, reference: EpisodeTrace, candidate: EpisodeTrace) -> Drift:
        pairs = list(zip(reference.states, candidate.states, strict=False))
        drift = cls(by_write=[max_abs(ours.mean, theirs.mean) for ours, theirs in pairs])
        drift.mean = max(drift.by_write, default=0.0)
        drift.covariance = _largest([(ours.covariance, theirs.covariance) for ours, theirs in pairs])
        drift.code = _largest(zip(reference.codes, candidate.codes, strict=False))
        drift.reading = _largest(zip(reference.readings, candidate.readings, strict=False))
        drift.slot = _largest(
            pair
            for ours, theirs in zip(reference.slots, candidate.slots, strict=False)
            for pair in zip(ours, theirs, strict=True)
        )
        scopes = zip(reference.scopes, candidate.scopes, strict=False)
        drift.scope = max((abs(ours - theirs) for ours, theirs in scopes), default=0.0)
        return drift

    @property
    def largest(self) -> float:
        return max(self.mean, self.covariance, self.code, self.reading, self.scope, self.slot)


def _largest(pairs) -> float:
    return max((max_abs(ours, theirs) for ours, theirs in pairs), default=0.0)


@dataclass
class Scores:
    """Right answers (exact match) of both models on the same samples."""

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


@dataclass
class Metrics:
    """Everything measured. `replayed` and `comparison` are None where a backend can't be opened."""

    free: Agreement = field(default_factory=Agreement)
    """Greedy answers of both, and logits teacher-forced on the reference's tokens."""
    scores: Scores = field(default_factory=Scores)
    drift: Drift = field(default_factory=Drift)
    replayed: Agreement | None = None
    comparison: Comparison | None = None
    replayed_drift: Drift | None = None
    replay_unavailable: str | None = None
