"""When a memory's reading points at one entry clearly enough to say its text, as a model's configuration says it.

Knows no memory and computes nothing; `microvlm.memory.pointing.confidence` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from msgspec import Meta

from microvlm.configuration.checked_fields import Share, check_fields, require

Weight = Annotated[float, Meta(ge=-1e4, le=1e4)]


@dataclass(frozen=True)
class PointingWeights:
    """One weight for each number of a reading's evidence, in its order, and a constant. The defaults are `nano`'s.

    The parts of a query, its picture and its words alone, have weights of 0 in configurations of older versions.
    """

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
    picture_cosine: Weight = 0.0
    """Of the cosine of the keys of the two pictures alone; 1 without any, -1 where one of the two has none."""
    second_picture_cosine: Weight = 0.0
    """Of the largest such cosine of an entry with another picture; 0 where there is none."""
    question_cosine: Weight = 0.0
    """Of the cosine of the keys of the words alone."""
    second_question_cosine: Weight = 0.0
    """Of the largest such cosine of an entry with other words; 0 where there is none."""
    log_picture_distance: Weight = 0.0
    """Of log(1 - `picture_cosine`), at least log 1e-4."""
    log_second_picture_distance: Weight = 0.0
    """Of the same of `second_picture_cosine`."""
    log_question_distance: Weight = 0.0
    """Of the same of `question_cosine`."""
    log_second_question_distance: Weight = 0.0
    """Of the same of `second_question_cosine`."""
    constant: Weight = -3.9321

    def __post_init__(self) -> None:
        check_fields(self)


EVIDENCE = tuple(item.name for item in fields(PointingWeights))[:-1]
"""Names of the numbers of a reading's evidence, in their order."""


@dataclass(frozen=True)
class PointingMap:
    """A probability, from the evidence of a reading, and the least that is enough."""

    threshold: Share = 0.71
    """The least probability that is enough."""
    weights: PointingWeights = field(default_factory=PointingWeights)
    """Those of the logistic regression."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class PointingConfig(PointingMap):
    """When a reading points at an entry clearly enough to say its text; else the answer is "not in this memory".

    The map itself gives the probability that the entry answers a query without a picture. Without the two others, as in
    older versions, it does for all queries.
    """

    same_picture: PointingMap | None = None
    """That the entry is about the picture of a query that has one."""
    same_question: PointingMap | None = None
    """That it answers the question of such a query."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.same_picture is None) == (self.same_question is None),
            "'pointing' needs both or neither of 'same_picture' and 'same_question'",
        )
