"""Questions about a described picture and their right answers. Knows no pixels.

A question is asked only where its answer is beyond doubt: of two things at nearly the same height none is "above".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from microvlm.training.photo.data.colours import NAMES
from microvlm.training.photo.data.composer import Description, Thing
from microvlm.training.photo.language import answers
from microvlm.training.photo.language.question_forms import Split, question
from microvlm.training.photo.language.thing_kinds import is_kind, kinds_of, thing_kinds

APART = 0.14
"""Least distance of two centres along an axis, as a share of the side, for one to be beside the other."""
CLEARER = 1.25
"""How much more two things must lie apart along an axis than across it."""
NOT_UNDERSTOOD_SHARE = 0.04
MOST_TRIES = 20
"""Kinds that are tried before a caption is asked for: a picture has no clear answer to many."""
KIND_SHARE = 0.5
"""How often "is this a {x}" and "is there a {x}" ask for a kind of thing: a dog, where a beagle is shown."""
SIDES = ("left", "right", "above", "below")


class Asked(NamedTuple):
    """A question and its right answer."""

    kind: str
    question: str
    answer: str


KIND_WEIGHTS: dict[str, dict[str, float]] = {
    "photo": {"describe": 3, "what": 4, "what_kind": 1.5, "is_it": 1.5, "is_there": 0.7, "where_absent": 0.3},
    "single": {"describe": 3, "what": 4, "what_kind": 1, "is_it": 1.5, "is_there": 0.5, "ground": 0.7,
        "how_many": 0.4, "where_absent": 0.3, "where": 0.3},
    "scene": {"describe": 1.5, "what_at": 3, "what_beside": 1.5, "between": 0.5, "where": 2,
        "where_absent": 0.6, "is_there": 1, "is_at": 1, "how_many": 0.8, "ground": 0.5,
        "how_many_of": 0.4},
    "count": {"describe": 1, "how_many": 3, "how_many_of": 2, "ground": 0.5, "is_there": 0.5,
        "what_same": 1},
    "coloured": {"describe": 0.7, "what_single": 1, "colour_of": 2.5, "colour": 2.5, "is_colour": 1.2,
        "ground": 0.8, "what_at": 0.5, "where_absent": 0.2},
    "tiles": {"describe": 1.5, "what_at": 4, "what_beside": 0.8, "where": 0.8, "is_there": 0.6,
        "is_at": 0.3},
    "stranger": {"describe": 1, "what": 1, "is_there": 0.3, "where_absent": 0.2},
    "clutter": {"describe": 1, "what": 1},
    "unnamed": {"describe": 1, "what": 1, "ground": 0.2},
    "virtual": {"describe": 1, "what": 1.5, "what_kind": 0.8, "is_it": 0.8},
}  # fmt: skip
"""Kind of picture -> how often each kind of question is asked about it."""


class Questioner:
    """Asks about descriptions, in the wordings of one split."""

    def __init__(self, names: Sequence[str], split: Split = "train"):
        """`names` are what may be asked about and not be there."""
        self.names, self.split = list(names), split
        self._askers: dict[str, Callable[[Description, np.random.Generator], Asked | None]] = {
            "describe": self._describe, "what": self._what, "what_single": self._what_single,
            "what_kind": self._what_kind, "what_same": self._what_same, "what_at": self._what_at,
            "what_beside": self._what_beside,
            "between": self._between, "where": self._where, "where_absent": self._where_absent,
            "how_many": self._how_many, "how_many_of": self._how_many_of, "colour_of": self._colour_of,
            "colour": self._colour, "ground": self._ground, "is_there": self._is_there,
            "is_colour": self._is_colour, "is_at": self._is_at, "is_it": self._is_it,
        }  # fmt: skip

    def ask(self, description: Description, rng: np.random.Generator) -> Asked:
        """A question of a random kind about a picture."""
        if rng.random() < NOT_UNDERSTOOD_SHARE:
            return Asked(
                "not_understood", question("not_understood", rng, self.split), answers.NOT_UNDERSTOOD
            )
        weights = KIND_WEIGHTS[description.kind]
        kinds, shares = list(weights), np.array(list(weights.values()))
        for _ in range(MOST_TRIES):
            asked = self._askers[kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]](
                description, rng
            )
            if asked is not None:
                return asked
        return self._describe(description, rng)

    def _asked(self, kind: str, answer: str, rng: np.random.Generator, **names: str) -> Asked:
        return Asked(kind, question(kind, rng, self.split, **names), answer)

    def _describe(self, d: Description, rng: np.random.Generator) -> Asked:
        return self._asked("describe", caption(d), rng)

    def _what(self, d: Description, rng: np.random.Generator) -> Asked | None:
        if len(d.things) > 1:
            return None
        name = d.things[0].name if d.things else None
        return self._asked("what", answers.UNKNOWN_THING if name is None else name, rng)

    def _what_kind(self, d: Description, rng: np.random.Generator) -> Asked | None:
        if len(d.things) != 1 or d.things[0].name is None:
            return None
        asked = self._asked_kind(d, rng)
        if asked is None:
            return None
        kind, is_right = asked
        return self._asked("what_kind", _name(d.things[0]) if is_right else answers.NOT_SEEN, rng, x=kind)

    def _what_single(self, d: Description, rng: np.random.Generator) -> Asked | None:
        return self._what(d, rng) if len(d.things) == 1 else None

    def _what_same(self, d: Description, rng: np.random.Generator) -> Asked | None:
        if len({thing.name for thing in d.things}) != 1:
            return None
        return self._asked("what", answers.counted(_name(d.things[0]), len(d.things)), rng)

    def _what_at(self, d: Description, rng: np.random.Generator) -> Asked | None:
        side = ("left", "right", "top", "bottom", "middle")[int(rng.integers(5))]
        found = thing_at(d.things, side)
        return None if found is None else self._asked("what_at", _name(found), rng, side=side)

    def _what_beside(self, d: Description, rng: np.random.Generator) -> Asked | None:
        anchor, side = _pick(d.things, rng), SIDES[int(rng.integers(4))]
        if _count(d, anchor) != 1:
            return None
        others = [thing for thing in d.things if thing is not anchor and is_beside(thing, side, anchor)]
        near = [thing for thing in d.things if thing is not anchor and _leans(thing, side, anchor)]
        if len(others) != 1 or len(near) != 1:
            return None
        return self._asked("what_beside", _name(others[0]), rng, x=_name(anchor), side=side)

    def _between(self, d: Description, rng: np.random.Generator) -> Asked | None:
        if len(d.things) != 3 or len({thing.name for thing in d.things}) != 3:
            return None
        for first, second in (("left", "right"), ("above", "below")):
            for middle in d.things:
                a, b = (thing for thing in d.things if thing is not middle)
                if is_beside(a, second, middle):
                    a, b = b, a
                if is_beside(a, first, middle) and is_beside(b, second, middle):
                    if rng.random() < 0.5:
                        a, b = b, a
                    return self._asked("between", _name(middle), rng, x=_name(a), y=_name(b))
        return None

    def _where(self, d: Description, rng: np.random.Generator) -> Asked | None:
        thing = _pick(d.things, rng)
        side = side_of(thing)
        if side is None or _count(d, thing) != 1:
            return None
        return self._asked("where", answers.place(side), rng, x=_name(thing))

    def _where_absent(self, d: Description, rng: np.random.Generator) -> Asked:
        name = self._absent(d, rng)
        return self._asked("where", answers.absent(name), rng, x=name)

    def _how_many(self, d: Description, rng: np.random.Generator) -> Asked:
        return self._asked("how_many", answers.how_many(len(d.things)), rng)

    def _how_many_of(self, d: Description, rng: np.random.Generator) -> Asked:
        if rng.random() < 0.2:
            name = self._absent(d, rng)
            return self._asked("how_many_of", answers.how_many(0, name), rng, x=name)
        thing = _pick(d.things, rng)
        return self._asked(
            "how_many_of", answers.how_many(_count(d, thing), _name(thing)), rng, x=_name(thing)
        )

    def _colour_of(self, d: Description, rng: np.random.Generator) -> Asked | None:
        thing = _pick(d.things, rng)
        return None if thing.colour is None else self._asked("colour_of", thing.colour, rng, x=_name(thing))

    def _colour(self, d: Description, rng: np.random.Generator) -> Asked | None:
        if len(d.things) != 1 or d.things[0].colour is None:
            return None
        return self._asked("colour", d.things[0].colour, rng)

    def _ground(self, d: Description, rng: np.random.Generator) -> Asked | None:
        return None if d.ground is None else self._asked("ground", d.ground, rng)

    def _is_there(self, d: Description, rng: np.random.Generator) -> Asked:
        asked = self._asked_kind(d, rng) if rng.random() < KIND_SHARE else None
        if asked is not None:
            return self._asked("is_there", answers.yes_or_no(asked[1]), rng, x=asked[0])
        is_there = bool(d.things) and rng.random() < 0.5
        name = _name(_pick(d.things, rng)) if is_there else self._absent(d, rng)
        return self._asked("is_there", answers.yes_or_no(is_there), rng, x=name)

    def _is_colour(self, d: Description, rng: np.random.Generator) -> Asked | None:
        thing = _pick(d.things, rng)
        if thing.colour is None:
            return None
        is_right = rng.random() < 0.5
        colour = thing.colour if is_right else _other(NAMES, thing.colour, rng)
        return self._asked("is_colour", answers.yes_or_no(is_right), rng, x=_name(thing), colour=colour)

    def _is_at(self, d: Description, rng: np.random.Generator) -> Asked | None:
        if len(d.things) < 2:
            return None
        first, second = rng.choice(len(d.things), 2, replace=False)
        a, b = d.things[int(first)], d.things[int(second)]
        side = SIDES[int(rng.integers(4))]
        if a.name == b.name or max(_count(d, a), _count(d, b)) > 1:
            return None
        truth = is_beside(a, side, b)
        # "no" is sure for what lies clearly on the other side, or clearly across.
        if not truth and not any(is_beside(a, other, b) for other in SIDES if other != side):
            return None
        return self._asked("is_at", answers.yes_or_no(truth), rng, x=_name(a), y=_name(b), side=side)

    def _is_it(self, d: Description, rng: np.random.Generator) -> Asked | None:
        if len(d.things) != 1 or d.things[0].name is None:
            return None
        asked = self._asked_kind(d, rng) if rng.random() < KIND_SHARE else None
        if asked is not None:
            return self._asked("is_it", answers.yes_or_no(asked[1]), rng, x=asked[0])
        is_right = rng.random() < 0.5
        name = _name(d.things[0]) if is_right else self._absent(d, rng)
        return self._asked("is_it", answers.yes_or_no(is_right), rng, x=name)

    def _asked_kind(self, d: Description, rng: np.random.Generator) -> tuple[str, bool] | None:
        """A kind, and whether one of the things is of it, half of the time; None where that is not known.

        An absent kind is one of another name: of each kind about as many questions then have "no" as "yes".
        """
        names = [thing.name for thing in d.things if thing.name is not None]
        if not names or len(names) < len(d.things):
            return None
        present = sorted({kind for name in names for kind in kinds_of(name)})
        if present and rng.random() < 0.5:
            return present[int(rng.integers(len(present)))], True
        for _ in range(MOST_TRIES):
            kinds = sorted(kinds_of(self.names[int(rng.integers(len(self.names)))]))
            absent = [kind for kind in kinds if all(is_kind(name, kind) is False for name in names)]
            if absent:
                return absent[int(rng.integers(len(absent)))], False
        return None

    def _absent(self, d: Description, rng: np.random.Generator) -> str:
        present = {thing.name for thing in d.things if thing.name}
        while True:
            name = self.names[int(rng.integers(len(self.names)))]
            # "dog" is not absent where a "dog face" or a beagle is shown.
            if any(name in other or other in name for other in present):
                continue
            if name in thing_kinds() and any(is_kind(other, name) is not False for other in present):
                continue
            return name


def caption(d: Description) -> str:
    """What `describe the image` is answered with."""
    names = [thing.name for thing in d.things]
    if not names or None in names:
        return answers.UNKNOWN_THING
    known = [str(name) for name in names]
    if len(known) == 1:
        colour = d.things[0].colour
        return known[0] if colour is None else f"{colour} {known[0]}"
    if len(set(known)) < len(known):
        return answers.describe_scene(known)
    if any(thing.colour for thing in d.things):
        known = [f"{thing.colour} {thing.name}" for thing in d.things]
    for axis, side in ((0, "left"), (1, "above")):
        order = sorted(range(len(known)), key=lambda i: _centre(d.things[i])[axis])
        if all(is_beside(d.things[a], side, d.things[b]) for a, b in pairwise(order)):
            return answers.describe_scene([known[i] for i in order], side)
    order = sorted(range(len(known)), key=lambda i: _centre(d.things[i])[0])
    return answers.describe_scene([known[i] for i in order])


def thing_at(things: Sequence[Thing], side: str) -> Thing | None:
    """The thing that is clearly farthest to this side, or clearly the one in the middle; None if none is."""
    if len(things) < 2:
        return None
    if side == "middle":
        ranked = sorted(things, key=_distance_from_middle)
        first, second = map(_distance_from_middle, ranked[:2])
        return ranked[0] if first < 0.17 and second > first + APART else None
    axis, sign = (
        (0, 1) if side == "left" else (0, -1) if side == "right" else (1, 1) if side == "top" else (1, -1)
    )
    ranked = sorted(things, key=lambda thing: sign * _centre(thing)[axis])
    apart = sign * (_centre(ranked[1])[axis] - _centre(ranked[0])[axis])
    return ranked[0] if apart > APART else None


def is_beside(a: Thing, side: str, b: Thing) -> bool:
    """Whether a clearly is left of, right of, above or below b."""
    along, across = _offset(a, side, b)
    return along > APART and along > CLEARER * abs(across)


def side_of(thing: Thing) -> str | None:
    """Where a thing clearly is in the picture: left, right, top, bottom or middle; None where two could be meant."""
    x, y = (value - 0.5 for value in _centre(thing))
    if max(abs(x), abs(y)) < 0.1:
        return "middle"
    if max(abs(x), abs(y)) < 0.17 or max(abs(x), abs(y)) < CLEARER * min(abs(x), abs(y)):
        return None
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def _leans(a: Thing, side: str, b: Thing) -> bool:
    along, across = _offset(a, side, b)
    return along > APART / 2 and along > 0.7 * abs(across)


def _offset(a: Thing, side: str, b: Thing) -> tuple[float, float]:
    (ax, ay), (bx, by) = _centre(a), _centre(b)
    right, down = ax - bx, ay - by
    return {"left": (-right, down), "right": (right, down), "above": (-down, right), "below": (down, right)}[
        side
    ]


def _centre(thing: Thing) -> tuple[float, float]:
    left, top, right, bottom = thing.box
    return (left + right) / 2, (top + bottom) / 2


def _distance_from_middle(thing: Thing) -> float:
    x, y = _centre(thing)
    return float(np.hypot(x - 0.5, y - 0.5))


def _count(d: Description, thing: Thing) -> int:
    return Counter(other.name for other in d.things)[thing.name]


def _name(thing: Thing) -> str:
    assert thing.name is not None
    return thing.name


def _other(options: Sequence[str], but: str, rng: np.random.Generator) -> str:
    rest = [option for option in options if option != but]
    return rest[int(rng.integers(len(rest)))]


def _pick(things: Sequence[Thing], rng: np.random.Generator) -> Thing:
    return things[int(rng.integers(len(things)))]
