"""Compose pictures and say what they show: the samples that `microvlm-data photo` encodes.

A sample is a picture and a description; questions about it are made later. Everything is drawn from the generator that
is given, so that a sample is a function of seed and place alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
from PIL import Image

from microvlm.errors import UserError
from microvlm.training.photo.data import canvas
from microvlm.training.photo.data.canvas import SIDE, Box
from microvlm.training.photo.data.colours import NAMES, shade
from microvlm.training.photo.data.sources import ONE_COLOUR, Drawing, Photo, Sources, Split

MOST_OBJECTS = 6
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Thing(msgspec.Struct, frozen=True):
    """One object of a picture."""

    name: str | None
    """None for a thing without a name."""
    box: Box
    colour: str | None = None
    """Only where the whole thing has one colour."""


class Description(msgspec.Struct, frozen=True):
    """What a picture shows."""

    kind: str
    """A key of `MIXTURE`."""
    things: tuple[Thing, ...]
    ground: str | None = None
    """The ground's colour; None for a photograph."""
    source: str = ""
    """What whole pictures are made of: two samples of one source are two views of it."""


class Sample(NamedTuple):
    """A picture, uint8 [256, 256, 3], and what it shows."""

    pixels: np.ndarray
    description: Description


MIXTURE = {
    "photo": 62, "single": 44, "scene": 56, "count": 24, "coloured": 20, "tiles": 14, "stranger": 8, "clutter": 8,
    "unnamed": 20,
}  # fmt: skip
"""Samples of each kind in a chunk of 256."""


_IN_PLACE = {
    "photo": ("single",), "single": ("photo",), "scene": ("tiles",), "count": ("photo",),
    "coloured": ("single", "photo"), "tiles": ("scene",), "stranger": (), "clutter": ("stranger",),
    "unnamed": ("stranger",),
}  # fmt: skip
"""What is composed instead of a kind that there is nothing for: users may have photographs alone, or drawings alone."""


class Composer:
    """Draws samples of one split."""

    def __init__(self, sources: Sources, split: Split):
        self.sources, self.split = sources, split
        photos = [photo for photo in sources.photos if photo.split == split]
        self.labelled = [photo for photo in photos if photo.label is not None]
        self.clutter = [photo for photo in photos if photo.label is None]
        self.grounds = [photo for photo in sources.photos if photo.split == split and photo.source != "coco"]
        drawn = [drawing for drawing in sources.drawings if drawing.split == split]
        self.shows_trained = split == "calibration" and not any(d.name is not None for d in drawn)
        """Whether views of drawings that are trained on stand in: no vendor's are held out for calibration."""
        if self.shows_trained:
            drawn += [d for d in sources.drawings if d.name is not None and d.split == "train"]
        self.named = [
            drawing for drawing in drawn if drawing.name is not None and drawing.sheet != ONE_COLOUR
        ]
        self.unnamed = [drawing for drawing in drawn if drawing.name is None]
        self.one_colour = [d for d in sources.drawings if d.sheet == ONE_COLOUR and d.name is not None]
        self._makers: dict[str, Callable[[np.random.Generator], Sample]] = {
            "photo": self._photo, "single": self._single, "scene": self._scene, "count": self._count,
            "coloured": self._coloured, "tiles": self._tiles, "stranger": self._stranger,
            "clutter": self._clutter, "unnamed": self._unnamed,
        }  # fmt: skip

    def sample(self, kind: str, rng: np.random.Generator) -> Sample:
        """One sample of a kind of `MIXTURE`, or of the first kind in its place that there is material for."""
        for possible in (kind, *_IN_PLACE[kind]):
            if self._has(possible):
                return self._makers[possible](rng)
        raise UserError(
            f"there are no pictures to compose the {self.split} split of: give more photographs or drawings."
        )

    def _has(self, kind: str) -> bool:
        material = {
            "photo": self.labelled, "tiles": self.labelled, "clutter": self.clutter, "coloured": self.one_colour,
            "unnamed": self.unnamed, "stranger": ["noise"],
        }  # fmt: skip
        return bool(material.get(kind, self.named))

    def views(self, rng: np.random.Generator, count: int) -> list[Sample]:
        """Several pictures of one thing: a photograph, or a drawing with or without a name."""
        if not self.named or (self.labelled and rng.random() < 0.5):
            photo = _pick(self.labelled if rng.random() < 0.85 or not self.clutter else self.clutter, rng)
            return [self._view_of(photo, rng) for _ in range(count)]
        drawing = _pick(self.named if rng.random() < 0.4 or not self.unnamed else self.unnamed, rng)
        return [self._alone(drawing, "single", rng) for _ in range(count)]

    def plain(self, rng: np.random.Generator) -> Sample:
        """A photograph nearly whole, or a drawing that fills a plain ground: as people show things."""
        if not self.named or (self.labelled and rng.random() < 0.5):
            photo = _pick(self.labelled, rng)
            picture = canvas.crop(canvas.open_photo(photo.read()), rng, 0.85, (SIDE, SIDE))
            return Sample(
                canvas.with_noise(picture, rng),
                Description("photo", (Thing(photo.label, WHOLE),), None, photo.key),
            )
        drawing = _pick(self.named, rng)
        picture, ground = self._ground(rng, 0.0)
        angle = 0.0 if rng.random() < 0.7 else float(rng.uniform(-15, 15))
        box = canvas.place(picture, self.sources.pixels(drawing), rng.uniform(0.75, 1.0), angle, (0.5, 0.5))
        things = (Thing(drawing.name, box or WHOLE),)
        return Sample(
            canvas.with_noise(picture, rng), Description("single", things, ground, _source(drawing))
        )

    def _photo(self, rng: np.random.Generator) -> Sample:
        return self._view_of(_pick(self.labelled, rng), rng)

    def _view_of(self, photo: Photo, rng: np.random.Generator) -> Sample:
        picture = canvas.crop(canvas.open_photo(photo.read()), rng, 0.6, (SIDE, SIDE))
        things = (Thing(photo.label, WHOLE),)
        return Sample(canvas.with_noise(picture, rng), Description("photo", things, None, photo.key))

    def _clutter(self, rng: np.random.Generator) -> Sample:
        photo = _pick(self.clutter, rng)
        picture = canvas.crop(canvas.open_photo(photo.read()), rng, 0.4, (SIDE, SIDE))
        return Sample(canvas.with_noise(picture, rng), Description("clutter", (), None, photo.key))

    def _stranger(self, rng: np.random.Generator) -> Sample:
        kind = canvas.STRANGER_KINDS[int(rng.integers(len(canvas.STRANGER_KINDS)))]
        return Sample(canvas.stranger(kind, rng), Description("stranger", (), None, kind))

    def _single(self, rng: np.random.Generator) -> Sample:
        return self._alone(_pick(self.named, rng), "single", rng)

    def _unnamed(self, rng: np.random.Generator) -> Sample:
        return self._alone(_pick(self.unnamed, rng), "unnamed", rng)

    def _alone(self, drawing: Drawing, kind: str, rng: np.random.Generator) -> Sample:
        for _ in range(10):
            picture, ground = self._ground(rng, 0.3)
            size = rng.uniform(0.4, 1.0) if rng.random() < 0.7 else 1.0
            free = max(0.0, 1 - size) / 2 + 0.08
            centre = (0.5 + rng.uniform(-free, free), 0.5 + rng.uniform(-free, free))
            box = canvas.place(picture, self.sources.pixels(drawing), size, _angle(rng), centre)
            if box is not None:
                break
        things = (Thing(drawing.name, box or WHOLE),)
        return Sample(canvas.with_noise(picture, rng), Description(kind, things, ground, _source(drawing)))

    def _scene(self, rng: np.random.Generator) -> Sample:
        count = int(rng.choice([2, 2, 2, 3, 3, 4, 5]))
        drawings: list[Drawing] = []
        while len(drawings) < count:
            drawing = _pick(self.named, rng)
            if all(drawing.name != other.name for other in drawings):
                drawings.append(drawing)
        return self._arranged([(self.sources.pixels(d), d.name, None) for d in drawings], "scene", rng)

    def _count(self, rng: np.random.Generator) -> Sample:
        count = int(rng.integers(1, MOST_OBJECTS + 1))
        kinds = 1 if rng.random() < 0.7 or count < 2 else 2
        drawings = [_pick(self.named, rng) for _ in range(kinds)]
        chosen = [drawings[int(rng.integers(kinds))] for _ in range(count)]
        return self._arranged([(self.sources.pixels(d), d.name, None) for d in chosen], "count", rng)

    def _coloured(self, rng: np.random.Generator) -> Sample:
        count = int(rng.choice([1, 1, 2, 3]))
        colours = rng.choice(len(NAMES), count, replace=False)
        pieces: list[tuple[np.ndarray, str | None, str | None]] = []
        names: set[str | None] = set()
        while len(pieces) < count:
            drawing = _pick(self.one_colour, rng)
            if drawing.name in names:
                continue
            names.add(drawing.name)
            colour = NAMES[int(colours[len(pieces)])]
            painted = canvas.recolour(self.sources.pixels(drawing), shade(colour, rng))
            pieces.append((painted, drawing.name, colour))
        return self._arranged(pieces, "coloured", rng, {NAMES[int(c)] for c in colours})

    def _tiles(self, rng: np.random.Generator) -> Sample:
        count = int(rng.choice([2, 2, 3]))
        is_row = rng.random() < 0.6
        picture, ground = self._ground(rng, 0.0)
        things = []
        gap = rng.uniform(0, 0.04)
        share = 1 / count
        for place in range(count):
            photo = _pick(self.labelled, rng)
            long_side = 1.0 if rng.random() < 0.5 else rng.uniform(share, 1.0)
            wide, high = (share - gap, long_side) if is_row else (long_side, share - gap)
            tile = canvas.crop(
                canvas.open_photo(photo.read()),
                rng,
                0.8,
                (max(8, round(wide * SIDE)), max(8, round(high * SIDE))),
            )
            x, y = (
                (place * share + gap / 2, rng.uniform(0, 1 - high))
                if is_row
                else (rng.uniform(0, 1 - wide), place * share + gap / 2)
            )
            picture.paste(tile, (round(x * SIDE), round(y * SIDE)))
            things.append(Thing(photo.label, (x, y, x + wide, y + high)))
        return Sample(canvas.with_noise(picture, rng), Description("tiles", tuple(things), ground))

    def _arranged(
        self, pieces: list[tuple[np.ndarray, str | None, str | None]], kind: str, rng: np.random.Generator,
        not_ground: set[str] = frozenset(),  # type: ignore[assignment]
    ) -> Sample:  # fmt: skip
        """Drawings at random places of one ground, larger the fewer they are; they may overlap a little."""
        widest = {1: 0.8, 2: 0.55, 3: 0.48, 4: 0.42, 5: 0.38, 6: 0.34}[len(pieces)]
        while True:
            picture, ground = self._ground(rng, 0.35 if kind != "coloured" else 0.0, not_ground)
            sizes = rng.uniform(max(0.24, widest * 0.6), widest, len(pieces))
            centres = _centres(sizes, rng)
            if centres is None:
                continue
            things = []
            for (pixels, name, colour), size, centre in zip(pieces, sizes, centres, strict=True):
                box = canvas.place(picture, pixels, float(size), _angle(rng), centre)
                if box is not None:
                    things.append(Thing(name, box, colour))
            if len(things) == len(pieces):
                return Sample(canvas.with_noise(picture, rng), Description(kind, tuple(things), ground))

    def _ground(
        self,
        rng: np.random.Generator,
        photographed: float,
        without: set[str] = frozenset(),  # type: ignore[assignment]
    ) -> tuple[Image.Image, str | None]:
        """A plain ground and its colour's name, or, with this probability, a part of a photograph and None."""
        if self.grounds and rng.random() < photographed:
            photo = canvas.open_photo(_pick(self.grounds, rng).read())
            return canvas.crop(photo, rng, 0.3, (SIDE, SIDE)), None
        names = [name for name in NAMES if name not in without]
        # White is what most drawings lie on.
        name = "white" if "white" in names and rng.random() < 0.25 else names[int(rng.integers(len(names)))]
        return Image.new("RGB", (SIDE, SIDE), shade(name, rng)), name


def _centres(sizes: np.ndarray, rng: np.random.Generator) -> list[tuple[float, float]] | None:
    """Centres for objects of these sizes, so that none covers much of another; None if there was no room."""
    placed: list[tuple[float, float]] = []
    for number, size in enumerate(sizes):
        for _ in range(40):
            # A tenth of an object may lie beyond the edge.
            edge = size * rng.choice([0.5, 0.5, 0.5, 0.4])
            x, y = rng.uniform(edge, 1 - edge, 2)
            apart = [np.hypot(x - px, y - py) > 0.45 * (size + sizes[i]) for i, (px, py) in enumerate(placed)]
            if all(apart):
                placed.append((float(x), float(y)))
                break
        if len(placed) != number + 1:
            return None
    return placed


def _angle(rng: np.random.Generator) -> float:
    return 0.0 if rng.random() < 0.4 else float(rng.uniform(-45, 45))


def _source(drawing: Drawing) -> str:
    return f"{drawing.sheet}/{drawing.row}"


def _pick(items: list, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]
