"""Concepts to remember by name: for each object one picture that is written and another view that is asked about.

Objects come from the package's drawings, or from a folder of a user's pictures with a sub-folder for each. Those of the
choosing split are used to choose thresholds and for nothing else. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.memory.fact_sets import another_view
from microvlm.bench.memory.memoryset_reader import load_memoryset
from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.inputs.images import load_square

CHOOSING = 6
"""One of so many objects is in the choosing split."""
LEAST_STRANGERS = 4
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Concept:
    """One object. Pixels are uint8 [S, S, 3]."""

    name: str
    written: np.ndarray
    """The picture that is shown when the name is written."""
    asked: np.ndarray
    """Another view of the same."""
    can_be_written: bool = True
    """False where there is no second view, so that it serves as a stranger only."""


@dataclass(frozen=True)
class ConceptSet:
    """The objects of both splits, shuffled."""

    choosing: tuple[Concept, ...]
    scored: tuple[Concept, ...]

    def deal(self, count: int) -> tuple[list[Concept], list[Concept]]:
        """(concepts to write, strangers) of the scored split. Raises UserError where there are too few."""
        return divide(self.scored, count)

    def deal_choosing(self, count: int) -> tuple[list[Concept], list[Concept]]:
        """The same of the choosing split: `count` concepts, or half of it where it has fewer."""
        return divide(self.choosing, min(count, max(1, len(self.choosing) // 2)), least_strangers=1)


def divide(
    concepts: Sequence[Concept], count: int, least_strangers: int = LEAST_STRANGERS
) -> tuple[list[Concept], list[Concept]]:
    """The first `count` that can be written, and the others. Raises UserError where too few others are left."""
    written = [concept for concept in concepts if concept.can_be_written][:count]
    chosen = set(map(id, written))
    strangers = [concept for concept in concepts if id(concept) not in chosen]
    if len(written) < count or len(strangers) < least_strangers:
        raise UserError(
            f"--concepts {count} needs as many objects with two views and {least_strangers} others, beside those that "
            f"thresholds are chosen on; there are {len(written)} and {len(strangers)}: give a smaller number."
        )
    return written, strangers


def built_in_concepts(seed: int) -> ConceptSet:
    """The package's drawings, each in two views drawn with `seed`, under made-up names."""
    objects, images = load_memoryset(), load_evalset()
    drawings = [objects.pixels(item.file) for item in objects.objects]
    drawings += [images.pixels(item.file) for item in images.images]
    rng = np.random.default_rng(seed)
    names = made_up_names(len(drawings), rng)
    shuffled = [drawings[index] for index in rng.permutation(len(drawings))]
    concepts = []
    for number, drawing in enumerate(shuffled):
        # What is small in a corner is of the choosing split: no scored view shows another scored object.
        beside = shuffled[number % (len(shuffled) // CHOOSING)]
        written, asked = (another_view(drawing, beside, rng) for _ in range(2))
        concepts.append(Concept(names[number], written, asked))
    return split(concepts)


def concepts_of_folder(folder: Path, vision: VisionConfig, seed: int) -> ConceptSet:
    """A folder with a sub-folder for each concept, by its name: the first picture is written, the second asked about.

    Pictures become squares as the model's processor makes them.

    Raises UserError for a folder without any, and for a damaged picture.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one with a sub-folder of pictures for each concept.")
    side, stretch = vision.image_size, vision.resize == "stretch"
    concepts = []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        views = [np.asarray(load_square(file, side, stretch)) for file in files[:2]]
        if views:
            concepts.append(Concept(path.name, views[0], views[-1], len(views) > 1))
    if len(concepts) < 2 * CHOOSING:
        raise UserError(
            f"{folder} has {len(concepts)} sub-folders with pictures; give {2 * CHOOSING} or more, each with two views."
        )
    order = np.random.default_rng(seed).permutation(len(concepts))
    return split([concepts[index] for index in order])


def split(concepts: Sequence[Concept]) -> ConceptSet:
    """The first of CHOOSING parts are for choosing."""
    count = len(concepts) // CHOOSING
    return ConceptSet(tuple(concepts[:count]), tuple(concepts[count:]))


def made_up_names(count: int, rng: np.random.Generator) -> list[str]:
    """Different names of three syllables that no data has."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = (
            _CONSONANTS[int(rng.integers(len(_CONSONANTS)))] + _VOWELS[int(rng.integers(len(_VOWELS)))]
            for _ in range(3)
        )
        names["".join(syllables)] = None
    return list(names)
