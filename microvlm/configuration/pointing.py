"""When a memory's reading points at one entry clearly enough to say its text, as a model's configuration says it.

Knows no memory and computes nothing; `microvlm.memory.pointing.confidence` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from msgspec import Meta

from microvlm.configuration.checked_fields import Share, check_fields

Weight = Annotated[float, Meta(ge=-1e4, le=1e4)]


@dataclass(frozen=True)
class PointingWeights:
    """One weight for each number of a reading's evidence, in its order, and a constant. The defaults are `nano`'s."""

    share: Weight = 1.6093
    """Of the entry's share in the reading: 1 where the question is the entry's own."""
    second_share: Weight = -2.1226
    """Of the next entry's share."""
    own_share: Weight = -1.0965
    """Of the entry's part of what its own key reads: less in a crowded state."""
    key_cosine: Weight = -0.8234
    """Of the cosine of the question's key with the entry's."""
    second_key_cosine: Weight = 1.6781
    """Of the largest cosine with another entry's key."""
    log_key_distance: Weight = -0.3243
    """Of the log of d U d' / w w' of the two keys' difference d."""
    cue_agreement: Weight = 9.4733
    """Of the cosine of the question's latent with that of the entry's question, outside the keys' subspace."""
    second_cue_agreement: Weight = -2.2471
    """Of the largest such cosine of another entry."""
    log_variance: Weight = 2.3103
    """Of the log of the key's posterior variance w U w' / w w'."""
    scope: Weight = 0.2212
    """Of the log odds of the scope detector."""
    log_facts: Weight = 0.1281
    """Of the log of the number of entries, those of all states."""
    constant: Weight = -3.9321

    def __post_init__(self) -> None:
        check_fields(self)


EVIDENCE = tuple(item.name for item in fields(PointingWeights))[:-1]
"""Names of the numbers of a reading's evidence, in their order."""


@dataclass(frozen=True)
class PointingConfig:
    """When a reading points at one entry clearly enough to say that entry's text."""

    threshold: Share = 0.71
    """Least confidence: below it the answer is "not in this memory"."""
    weights: PointingWeights = field(default_factory=PointingWeights)

    def __post_init__(self) -> None:
        check_fields(self)
