"""The records of a report of `microvlm-score`."""

from __future__ import annotations

import msgspec

from microvlm.bench.records import Figure, Provenance
from microvlm.formats.documents import Count


class Captions(msgspec.Struct, frozen=True):
    """Captions of one vendor's drawings."""

    exact_match: Figure
    count: Count = 0


class Scenes(msgspec.Struct, frozen=True):
    """Answers to one kind of scene question; `twins`: both of a scene and of its swapped twin right."""

    accuracy: Figure
    majority: Figure
    count: Count
    twins: Figure | None = None


class Episodes(msgspec.Struct, frozen=True):
    """Answers about earlier images, of episodes of one length."""

    accuracy: Figure
    memory_off: Figure
    count: Count


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """The scores of one model."""

    model: str
    captions: Captions
    captions_stress: Captions
    scenes: dict[str, Scenes]
    episodes: dict[str, Episodes]


class Difference(msgspec.Struct, frozen=True):
    """A paired difference of caption scores with its 95 % interval."""

    difference: Figure
    ci95_low: Figure
    ci95_high: Figure


class ScoreAgainst(Score, frozen=True, kw_only=True):
    """The scores of the model that another is compared with."""

    caption_difference: Difference | None = None


class Baseline(msgspec.Struct, frozen=True):
    """Nearest class means, by vendor."""

    emojione: Figure
    openmoji: Figure


class Baselines(msgspec.Struct, frozen=True):
    """Baselines that were scored."""

    pixels_24: Baseline | None = None
    efficientnet_lite0: Baseline | None = None


class ScoreReport(Score, frozen=True, kw_only=True):
    """The whole document."""

    provenance: Provenance
    against: ScoreAgainst | None = None
    baselines: Baselines = Baselines()

    def __post_init__(self) -> None:
        if self.against is None:
            return
        for name in ("scenes", "episodes"):
            if set(getattr(self, name)) - set(getattr(self.against, name)):
                raise ValueError(f"against.{name} lacks an entry of {name}")
