"""The samples of a comparison: evaluation images with the caption prompt, scene questions, and one long episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TypeVar

from microvlm.bench.evalset_reader import EvalSet
from microvlm.bench.photograph_reader import read_photographs
from microvlm.config import MicroVLMConfig

CAPTION = "caption"
EPISODE = "episode"
EPISODE_STEPS = 20
PHOTOGRAPHS = 0.5
"""Share of the compared images that are photographs, for a model that sees them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One prompt and its right answer."""

    name: str
    kind: str
    """`caption`, a kind of scene question, or `episode`."""
    prompt: str
    images: tuple[Path, ...]
    answer: str


@dataclass(frozen=True)
class EpisodeScript:
    """Images that are written one after another, each under a question, and the questions about them."""

    images: tuple[Path, ...]
    captions: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    caption_prompt: str


def choose(
    evalset: EvalSet, config: MicroVLMConfig, images: int, scenes: int, photograph_share: float = PHOTOGRAPHS
) -> list[Sample]:
    """`images` captions and `scenes` questions, evenly spread over the set; all of them where it holds fewer.

    A model that sees photographs gets photographs in place of `photograph_share` of the images, rounded up.
    """
    prompt = config.prompt.caption_prompt
    count = ceil(images * photograph_share) if config.vision.is_convolutional else 0
    photographs = spread(read_photographs(), count)
    captions = [Sample(photo.file, CAPTION, prompt, (photo.path,), photo.shows) for photo in photographs] + [
        Sample(image.file, CAPTION, prompt, (evalset.path(image.file),), image.caption)
        for image in spread(evalset.images, images - len(photographs))
    ]
    questions = [
        Sample(scene.file, scene.kind, scene.question, (evalset.path(scene.file),), scene.answer)
        for scene in spread(evalset.scenes, scenes)
    ]
    return captions + questions


def longest_episode(evalset: EvalSet, config: MicroVLMConfig, steps: int = EPISODE_STEPS) -> EpisodeScript:
    """The set's first episode of the most images, cut to `steps`."""
    episode = max(evalset.episodes, key=lambda candidate: len(candidate.files))
    captions = {image.file: image.caption for image in evalset.images}
    questions = [question for question in episode.questions if question.step < steps]
    return EpisodeScript(
        images=tuple(evalset.path(file) for file in episode.files[:steps]),
        captions=tuple(captions[file] for file in episode.files[:steps]),
        questions=tuple(question.question for question in questions),
        answers=tuple(question.answer for question in questions),
        caption_prompt=config.prompt.caption_prompt,
    )


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` items at equal distances, the first included; every item where there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
