"""What a split asks of a model that may decline: things with right answers, and things that should be declined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from microvlm.configuration.answers import AnswersConfig
from microvlm.errors import UserError
from microvlm.loaded_model import LoadedModel
from microvlm.training.data.caption_data import SPLITS, CaptionData, CaptionSample
from microvlm.training.data.mixture import permutation
from microvlm.training.scoring.answer_scores import Progress
from microvlm.training.scoring.held_out import EVERY_SPLIT, MOST_SAMPLES, view
from microvlm.training.scoring.text_measures import is_exact, words_of

BATCH = 16
_SEED = 4
_NAMING = (None, "what is this?")
"""Questions that a labelled picture's label and synonyms answer."""
_ARTICLES = ("a", "an", "the")


class Item(NamedTuple):
    """A question about shown pictures."""

    key: str
    question: str | None
    """None: the model's caption prompt."""
    images: tuple[bytes, ...]
    answers: tuple[str, ...]
    """All that are right."""
    declines: str
    """The kind of what should be declined; empty where there is a right answer."""

    @property
    def kind(self) -> str:
        """What the item is counted as: what it declines, `captions`, or a question's first two words."""
        if self.declines:
            return self.declines
        return "captions" if self.question is None else " ".join(words_of(self.question)[:2])


class Said(NamedTuple):
    """A model's answer to an item."""

    item: Item
    log_probability: float
    """Minus infinity where the model declined in its own words."""
    confidence: float | None
    declined: bool
    right: bool
    """Whether the model's own words are a right answer; never of an item that should be declined."""

    @property
    def names(self) -> bool:
        """Whether the model's own words name something."""
        return self.log_probability > -np.inf


def read_items(data: CaptionData, split: str, count: int | None = None) -> list[Item]:
    """The items of `count` samples of a split, which are the same for every model. Raises UserError without any."""
    splits = SPLITS if split == EVERY_SPLIT else (split,)
    places = [(name, index) for name in splits for index in range(data.count(name))]
    order = permutation(len(places), _SEED)[: count or MOST_SAMPLES].tolist() if places else []
    items = [item for number in order for item in _items(data.sample(*places[number]))]
    if not items:
        raise UserError(
            f"{data.folder} has no {split} samples with shown pictures: give another --split, or build it again with "
            "larger shares (microvlm-data images --validation, --test)."
        )
    return items


def _items(sample: CaptionSample) -> list[Item]:
    """Turns that ask the same about the same pictures are one item with several answers."""
    asked: dict[tuple[tuple[int, ...], str | None], list[tuple[str, str]]] = {}
    for turn in sample.turns:
        if turn.images:
            kind = "" if turn.declines is msgspec.UNSET else turn.declines
            asked.setdefault((turn.images, turn.question), []).append((turn.answer, kind))
    items = []
    for (numbers, question), given in asked.items():
        named = tuple(answer for answer, kind in given if not kind)
        declines = "" if named else given[0][1]
        images = tuple(sample.images[number] for number in numbers)
        label = sample.annotations.label
        if named and label is not None and len(sample.images) == 1 and question in _NAMING:
            named = (*named, label, *sample.annotations.synonyms)
        items.append(Item(sample.key, question, images, named, declines))
    return items


def answer_items(loaded: LoadedModel, items: Sequence[Item], progress: Progress) -> list[Said]:
    """The model's greedy answers. Raises UserError for a backend that tells no log probabilities."""
    vision, prompt = loaded.config.vision, loaded.config.prompt.caption_prompt
    # A model that was never calibrated declines in its own words too.
    config = loaded.config.answers or AnswersConfig()
    said: list[Said] = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        views = [[view(item.key, image, vision) for image in item.images] for item in part]
        answers = loaded.answer(views, [item.question or prompt for item in part])
        assert isinstance(answers, list)
        for item, answer in zip(part, answers, strict=True):
            if answer.log_probability is None:
                raise UserError("this backend tells no log probabilities of tokens: take another --backend.")
            names = not config.is_declining(answer.own_text)
            value = answer.log_probability if names else -np.inf
            right = names and not item.declines and is_right(answer.own_text, item.answers)
            said.append(Said(item, value, answer.confidence, answer.declined or not names, right))
        progress(len(said))
    return said


def is_right(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer has the words of a reference, in their order; an article before either does not matter."""
    return is_exact(_bare(answer), [_bare(reference) for reference in references])


def _bare(text: str) -> str:
    first, _, rest = text.strip().partition(" ")
    return rest if rest and first.casefold() in _ARTICLES else text
