"""Samples scenes and questions about them: which objects stand where on which ground. Knows no pixels.

Numpy and hashing only, so that an evaluation can import it without torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources

import numpy as np

GROUNDS = (
    ("white", (250, 250, 250)),
    ("black", (22, 22, 22)),
    ("grey", (134, 134, 134)),
    ("red", (208, 38, 44)),
    ("yellow", (250, 212, 52)),
    ("green", (46, 150, 70)),
    ("blue", (48, 96, 212)),
    ("pink", (246, 164, 204)),
)
Cell = tuple[float, float, float, float]
NUMBERS = ("one", "two", "three", "four")
KINDS = ("what", "where", "how many", "which colour")
SIDES = {"left-right": ("left", "right"), "above-below": ("above", "below")}
_ASK_SIDE = {"left": "on the left", "right": "on the right", "above": "above", "below": "below"}
_ASK_NEXT = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@lru_cache(maxsize=1)
def read_scene_objects() -> tuple[tuple[str, str], ...]:
    """The committed 48 scene objects, (hexcode, caption) each; `Placed.object` is an index into them.

    scene_objects.txt was made once, from the test emoji of the groups animals, food, travel and objects whose
    caption is one word of at most 12 letters and which all five large coloured training vendors draw: the 48 with the
    largest margin, the mean over vendors of the distance of an emoji's 24 x 24 pixels to the nearest class mean of
    another emoji less that to its own (class means over the other vendors). An object is hidden on a ground where at
    least .6 of its drawing, averaged over the vendors, is within .3 of the ground's colour.
    """
    return tuple((code, caption) for code, caption, _ in _object_rows())


def _object_rows() -> list[list[str]]:
    text = resources.files(__package__).joinpath("scene_objects.txt").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines() if line]


@lru_cache(maxsize=1)
def hidden_objects() -> np.ndarray:
    """bool [8, 48]: objects that are too hard to see on a ground; no scene shows them there."""
    return np.array([[name in hidden.split(",") for *_, hidden in _object_rows()] for name, _ in GROUNDS])


def pair_is_held_out(hex_a: str, hex_b: str) -> bool:
    """Whether an unordered pair belongs to the fifth of the pairs that only tests compose."""
    key = "|".join(sorted([hex_a.upper(), hex_b.upper()]))
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 5 == 0


@lru_cache(maxsize=1)
def held_out_pairs() -> np.ndarray:
    """`pair_is_held_out` of all scene objects: bool [48, 48], symmetric, False on the diagonal."""
    codes = [code for code, _ in read_scene_objects()]
    table = np.array([[a != b and pair_is_held_out(a, b) for b in codes] for a in codes])
    table.setflags(write=False)
    return table


@dataclass(frozen=True)
class Placed:
    """One object in a scene."""

    object: int
    """Index into read_scene_objects()."""
    x: float
    """Centre, 0 at the left edge, 1 at the right."""
    y: float
    """Centre, 0 at the top edge, 1 at the bottom."""
    size: float
    """Side of the drawing as a share of the image's side."""

    @property
    def caption(self) -> str:
        return read_scene_objects()[self.object][1]


@dataclass(frozen=True)
class Question:
    """One question about one scene."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A ground and one to four objects."""

    ground: int
    """Index into GROUNDS."""
    objects: tuple[Placed, ...]
    """The scene's objects; in a scene with a relation, the left or upper one comes first."""
    relation: str | None = None
    """`left-right`, `above-below`, or None if no question asks for a side."""

    def swapped(self) -> Scene:
        """The scene with its two objects exchanged; a model that only counts objects cannot tell the two apart."""
        if self.relation is None:
            raise ValueError("only a scene with a relation has a swapped twin")
        first, second = self.objects
        return replace(
            self, objects=(replace(first, object=second.object), replace(second, object=first.object))
        )

    def questions(self, kind: str) -> list[Question]:
        """Every question of this kind that has exactly one answer in this scene."""
        if kind == "how many":
            return [Question(kind, "how many objects are there?", NUMBERS[len(self.objects) - 1])]
        if kind == "which colour":
            return [Question(kind, "which colour is the ground?", GROUNDS[self.ground][0])]
        if self.relation is None:
            return []
        by_side = dict(zip(SIDES[self.relation], (o.caption for o in self.objects), strict=True))
        if kind == "where":
            return [Question(kind, f"where is the {caption}?", side) for side, caption in by_side.items()]
        direct = [Question(kind, f"what is {_ASK_SIDE[s]}?", caption) for s, caption in by_side.items()]
        beside = [
            Question(kind, f"what is {_ASK_NEXT[s]} the {by_side[_OPPOSITE[s]]}?", caption)
            for s, caption in by_side.items()
        ]
        return direct + beside


def _choose_objects(rng: np.random.Generator, count: int, test: bool, ground: int) -> list[int]:
    """`count` objects visible on the ground; all of their pairs are held out (`test`), or none is."""
    held_out = held_out_pairs()
    visible = ~hidden_objects()[ground]
    allowed = (held_out if test else ~held_out & ~np.eye(len(held_out), dtype=bool)) & visible
    while True:
        chosen = [int(rng.choice(np.flatnonzero(visible)))]
        while len(chosen) < count:
            candidates = np.flatnonzero(allowed[chosen].all(0))
            if not len(candidates):
                break
            chosen.append(int(rng.choice(candidates)))
        if len(chosen) == count:
            return chosen


def _place(rng: np.random.Generator, objects: list[int], cells: list[Cell]) -> tuple[Placed, ...]:
    """Place each object within its own cell (left, top, width, height), so that none overlap."""
    placed = []
    for index, (left, top, width, height) in zip(objects, cells, strict=True):
        size = rng.uniform(0.32, 0.46)
        x = left + size / 2 + rng.uniform(0.02, max(0.02, width - size - 0.02))
        y = top + size / 2 + rng.uniform(0.02, max(0.02, height - size - 0.02))
        placed.append(Placed(index, float(x), float(y), float(size)))
    return tuple(placed)


def sample_scene(
    rng: np.random.Generator, test: bool = False, relation: bool | None = None, ground: int | None = None
) -> Scene:
    """A random scene.

    test : use only held-out pairs. relation : True for two objects side by side or one above the other, False for one
    to four objects (counts equally likely), None for either. ground : None for any.
    """
    if ground is None:
        ground = int(rng.integers(len(GROUNDS)))
    if relation is None:
        relation = bool(rng.integers(2))
    if relation:
        name = ("left-right", "above-below")[rng.integers(2)]
        halves = {
            # The other axis stays near the middle, so that one relation holds and not two.
            "left-right": [(0.0, 0.2, 0.5, 0.6), (0.5, 0.2, 0.5, 0.6)],
            "above-below": [(0.2, 0.0, 0.6, 0.5), (0.2, 0.5, 0.6, 0.5)],
        }
        return Scene(ground, _place(rng, _choose_objects(rng, 2, test, ground), halves[name]), name)
    count = int(rng.integers(1, 5))
    quarters = [(0.5 * (q % 2), 0.5 * (q // 2), 0.5, 0.5) for q in rng.permutation(4)[:count]]
    return Scene(ground, _place(rng, _choose_objects(rng, count, test, ground), quarters))


def sample_question(
    rng: np.random.Generator, kind: str, test: bool = False, direct: bool = False
) -> tuple[Scene, Question]:
    """A random scene with a question of this kind; answers are about equally likely.

    direct : leave out the form "what is left of the X?", which the swapped scene does not have.
    """
    scene = sample_scene(rng, test, {"what": True, "where": True, "how many": False}.get(kind))
    questions = scene.questions(kind)
    if direct and kind == "what":
        questions = questions[:2]
    return scene, questions[rng.integers(len(questions))]
