"""What classes a described picture and its windows show: the targets of the encoder's classifiers. Knows no pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from microvlm.errors import UserError
from microvlm.training.photo.data.composer import Description

UNTOLD = -1
"""The target of what has none: a scene as a whole, a window that two things share."""
ALONE = ("photo", "single")
"""Kinds of pictures that show one thing."""
NAMELESS = ("clutter", "stranger", "unnamed")
NEAR_WHOLE, SLIGHT = 0.45, 0.08
"""Share of a window from which on a thing is its class, and up to which it still counts as ground."""


class Classes(NamedTuple):
    """The classes of an encoder: names, from 0 on, and the last two."""

    numbers: Mapping[str, int]
    """Class of each name, by the name in lower case."""
    unknown: int
    """The class of what has no name."""
    nothing: int
    """The class of a window of the ground."""

    @classmethod
    def of(cls, names: Sequence[str], count: int) -> Classes:
        """Classes of `names`, of `count` in all. Raises UserError where there are fewer."""
        if len(names) + 2 > count:
            raise UserError(
                f"the pictures have {len(names):,} names, and an encoder of {count:,} classes has room for "
                f"{count - 2:,}: give fewer kinds of pictures."
            )
        return cls({name.lower(): number for number, name in enumerate(names)}, count - 2, count - 1)

    def of_picture(self, description: Description) -> int:
        """The class of a whole picture, or UNTOLD."""
        if description.kind in NAMELESS:
            return self.unknown
        return self._of_name(description.things[0].name) if description.kind in ALONE else UNTOLD

    def of_windows(self, description: Description, side: int) -> np.ndarray:
        """The classes of `side` x `side` windows, int64 [windows]."""
        if description.kind in ("photo", "clutter", "stranger"):
            return np.full(side * side, UNTOLD)
        classes, most = np.full((side, side), self.nothing), np.zeros((side, side))
        edges = np.arange(side + 1) / side
        for thing in description.things:
            left, top, right, bottom = thing.box
            wide = np.clip(np.minimum(right, edges[1:]) - np.maximum(left, edges[:-1]), 0, None)
            high = np.clip(np.minimum(bottom, edges[1:]) - np.maximum(top, edges[:-1]), 0, None)
            share = np.outer(high, wide) * side * side
            # A small thing may fill no window: the one with most of it is its own.
            own = (share > NEAR_WHOLE) | (share == share.max())
            taken = own & (share > most)
            classes[taken] = self._of_name(thing.name)
            classes[~own & (share > SLIGHT) & (classes == self.nothing)] = UNTOLD
            most = np.maximum(most, np.where(own, share, 0))
        return classes.reshape(-1)

    def _of_name(self, name: str | None) -> int:
        return self.unknown if name is None else self.numbers.get(name.lower(), UNTOLD)
