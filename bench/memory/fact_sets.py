"""Facts to remember about held-out objects: a picture, a question about it, and a person's name.

No drawing of theirs by this vendor was trained on, and none has a caption or a fact in training, with two exceptions:
drawings by other vendors were distilled without names, and `photo` learnt from made-up facts about some of those. The
questions and the names are ones that training uses. Every fact is asked for with another view of its object than it was
written with. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from microvlm.bench.memory.memoryset_reader import MemorySet

_NAMES = """
anna ben clara david emma felix grace henry iris jack karen leo maria noah olive peter ruth sam tina victor adam bella
carl diana eric fiona george helen ivan julia kevin laura mark nina oscar paula quinn robert sara thomas ursula vera
walter xenia yusuf zoe alice bruno cora daniel
"""
NAMES = tuple(_NAMES.split())
"""Fifty values: a guess is right in one of fifty."""
QUESTIONS = (("whose is this?", "who owns this?"), ("who gave me this?", "who is this from?"))
"""A question and another wording of it; each object has one fact for each."""
GROUNDS = ((255, 255, 255), (180, 215, 245), (250, 225, 150), (190, 230, 190), (225, 225, 225))
WHITE_TOLERANCE = 24


@dataclass(frozen=True)
class Fact:
    """Pixels are uint8 [S, S, 3]."""

    object: int
    """Index of the object; two facts of one object differ in their question."""
    question: str
    paraphrase: str
    name: str
    written_view: np.ndarray
    """The picture that is shown when the fact is written."""
    query_view: np.ndarray
    """Another view of the same drawing, shown when the fact is asked for."""
    other_vendor_view: np.ndarray
    """A view of another vendor's drawing of the object."""


def deal(objects: MemorySet, count: int, seed: int = 0) -> list[Fact]:
    """`count` facts, or as many as the set has objects and questions, drawn at random with `seed`.

    The first facts are about different objects; half of those ask each question first.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(objects.objects))
    shuffled = [objects.objects[index] for index in order]
    pictures = [objects.pixels(item.file) for item in shuffled]
    facts: list[Fact] = []
    for turn in range(len(QUESTIONS)):
        for number, picture in enumerate(pictures[: max(0, count - len(facts))]):
            question, paraphrase = QUESTIONS[(turn + number) % len(QUESTIONS)]
            beside = pictures[(number + 1) % len(pictures)]
            other = objects.pixels(shuffled[number].other)
            name = NAMES[int(rng.integers(len(NAMES)))]
            views = (another_view(drawing, beside, rng) for drawing in (picture, picture, other))
            facts.append(Fact(int(order[number]), question, paraphrase, name, *views))
    return facts


def another_view(picture: np.ndarray, neighbour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A drawing on white, turned, scaled and moved on another ground, at times with `neighbour` in a corner."""
    side = picture.shape[0]
    drawn = Image.fromarray(picture)
    # White that touches a corner is ground; white inside of a drawing is not.
    mask = Image.new("L", (side + 2, side + 2), 255)
    framed = Image.new("RGB", (side + 2, side + 2), (255, 255, 255))
    framed.paste(drawn, (1, 1))
    marker = (255, 0, 255)
    ImageDraw.floodfill(framed, (0, 0), marker, thresh=WHITE_TOLERANCE)
    ground = (np.asarray(framed) == marker).all(-1)
    mask = Image.fromarray(np.where(ground, 0, 255).astype(np.uint8)).crop((1, 1, side + 1, side + 1))
    size = round(side * rng.uniform(0.7, 1.1))
    angle = float(rng.uniform(-20, 20))
    drawn, mask = (
        part.rotate(angle, Image.Resampling.BICUBIC, expand=False, fillcolor=fill).resize((size, size))
        for part, fill in ((drawn, (255, 255, 255)), (mask, 0))
    )
    view = Image.new("RGB", (side, side), GROUNDS[int(rng.integers(len(GROUNDS)))])
    if rng.random() < 0.5:
        small = Image.fromarray(neighbour).resize((side // 4, side // 4))
        view.paste(small, (0 if rng.random() < 0.5 else side - side // 4, side - side // 4))
    reach = max(1, abs(side - size) // 2 + side // 16)
    left, top = ((side - size) // 2 + int(rng.integers(-reach, reach + 1)) for _ in range(2))
    view.paste(drawn, (left, top), mask)
    return np.asarray(view)
