"""What a split holds to be scored: captioned pictures, questions about shown pictures, and episodes.

Every model is scored on the same samples, chosen by a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.training.batches.picture_views import plain_view
from microvlm.training.data.annotations import Annotations
from microvlm.training.data.caption_data import SPLITS, CaptionData, CaptionSample
from microvlm.training.data.mixture import permutation

MOST_SAMPLES = 1000
"""Samples that are scored where `--count` does not say how many."""
EVERY_SPLIT = "all"
"""Stands for all splits together, for data that no model was trained on."""
_SEED = 4
_Asked = dict[str | None, list[str]]


class Picture(NamedTuple):
    """A picture and all its captions."""

    key: str
    image: bytes
    """The picture's file."""
    captions: tuple[str, ...]
    objects: tuple[str, ...] = ()
    """Names of annotated objects."""

    def view(self, vision: VisionConfig) -> np.ndarray:
        """uint8 [side, side, 3]. Raises UserError, which names the sample, for a damaged one."""
        return view(self.key, self.image, vision)


class NamedPicture(NamedTuple):
    """A picture and the annotations that name it."""

    key: str
    image: bytes
    annotations: Annotations


class Question(NamedTuple):
    """A question about shown pictures, or in an episode about earlier ones, and all answers that were given to it."""

    key: str
    text: str | None
    """None: the model's caption prompt."""
    images: tuple[bytes, ...]
    answers: tuple[str, ...]


class Episode(NamedTuple):
    """Pictures that are shown one after another, and questions when none is in view."""

    images: tuple[bytes, ...]
    questions: tuple[Question, ...]


@dataclass
class HeldOut:
    """What the chosen samples of a split hold."""

    samples: int
    available: int
    """Samples of the whole split."""
    pictures: list[Picture] = field(default_factory=list)
    named: list[NamedPicture] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)


def view(key: str, image: bytes, vision: VisionConfig) -> np.ndarray:
    """A picture as inference sees it, uint8 [side, side, 3]. Raises UserError, which names the sample."""
    try:
        return plain_view(image, vision)
    except UserError as error:
        raise UserError(f"sample {key}: {error}") from None


def read_held_out(data: CaptionData, split: str, count: int | None = None) -> HeldOut:
    """Read `count` samples of a split, or of all of them. Raises UserError for a split without samples."""
    splits = SPLITS if split == EVERY_SPLIT else (split,)
    starts = np.cumsum([0, *(data.count(name) for name in splits)])
    total = int(starts[-1])
    if not total:
        others = (
            ", ".join(f"{name} {data.count(name):,}" for name in SPLITS if data.count(name)) or "none at all"
        )
        raise UserError(
            f"{data.folder} has no {split} samples (it has {others}): give another --split, or build it again with "
            "larger shares (microvlm-data images --validation, --test)."
        )
    chosen = permutation(total, _SEED)[: count or MOST_SAMPLES]
    held_out = HeldOut(len(chosen), total)
    for index in chosen:
        place = int(np.searchsorted(starts, index, side="right")) - 1
        sample = data.sample(splits[place], int(index - starts[place]))
        if len(sample.images) == 1 and sample.annotations.label is not None:
            held_out.named.append(NamedPicture(sample.key, sample.images[0], sample.annotations))
        _sort_turns(sample, held_out)
    return held_out


def _sort_turns(sample: CaptionSample, into: HeldOut) -> None:
    """Turns that ask the same about the same pictures become one item with several answers."""
    asked: dict[tuple[int, ...], _Asked] = {}
    for turn in sample.turns:
        asked.setdefault(turn.images, {}).setdefault(turn.question, []).append(turn.answer)
    captions: dict[int, tuple[str, ...]] = {}
    about_earlier: Sequence[Question] = ()
    for numbers, by_question in asked.items():
        images = tuple(sample.images[number] for number in numbers)
        questions = [
            Question(sample.key, text, images, tuple(answers)) for text, answers in by_question.items()
        ]
        if not numbers:
            about_earlier = questions
        elif len(numbers) == 1:
            if None in by_question:
                captions[numbers[0]] = tuple(by_question[None])
            into.questions += [question for question in questions if question.text is not None]
        else:
            into.questions += questions
    for number in sorted(captions):
        key = sample.key if len(captions) == 1 else f"{sample.key}.{number}"
        objects = sample.annotations.objects if len(sample.images) == 1 else ()
        names = tuple(known.name for known in objects)
        into.pictures.append(Picture(key, sample.images[number], captions[number], names))
    if about_earlier and captions:
        shown = tuple(sample.images[number] for number in sorted(captions))
        into.episodes.append(Episode(shown, tuple(about_earlier)))
