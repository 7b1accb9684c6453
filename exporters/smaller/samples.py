"""What costs of an export are measured on: a user's texts, or a model's own answers about the package's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

import microvlm
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, Prompt, embed_prompt, generate
from microvlm.inputs.processor import Processor
from microvlm.inputs.text_data import open_texts
from microvlm.memory.conversation import with_answer
from microvlm.runtime import Runtime

CALIBRATE, CHOOSE, MEASURE = 128, 24, 48
"""Samples that four bits are fitted to, those of them that layers are chosen on, others that costs are measured on."""
MOST_CHARACTERS = 400
"""Longer texts are cut: about a hundred tokens."""
ANSWER_TOKENS = 24
_PICTURES = ("bench/photographs/*.jpg", "bench/evalset/images/*.png", "bench/memoryset/images/*.png")
"""Below the package: photographs first, then drawings."""
_BATCH = 8
Item = TypeVar("Item")


class Sample(NamedTuple):
    """A text that a model reads or says."""

    text: str
    picture: Path | None = None
    """What the text answers the caption prompt about; None for a text that stands alone."""


class Samples(NamedTuple):
    """Samples for each purpose. None that something was chosen or calibrated on is measured; facts may be any."""

    calibrate: list[Sample]
    choose: list[Sample]
    """Some of those to calibrate on."""
    measure: list[Sample]
    facts: list[Sample]
    origin: str
    """What they are, for people."""


class Facts(NamedTuple):
    """Latents of facts, and those of the questions that ask for them, float32 [N, C] each."""

    cues: np.ndarray
    values: np.ndarray


def find_samples(runtime: Runtime, processor: Processor, texts: Path | None, facts: int) -> Samples:
    """Samples of the file `texts`, or else a model's own greedy answers about pictures; up to `facts` facts.

    Layers are chosen on the file's training split, costs are measured on the rest. Raises UserError for a file without
    texts that the model reads.
    """
    if texts is None:
        pictures = package_pictures()
        if not pictures:
            raise UserError(
                "this installation has no pictures to measure on: give texts with --calibrate FILE."
            )
        answered = _own_answers(runtime, processor, spread(pictures, max(CHOOSE + MEASURE, facts)))
        if len(answered) < 2:
            raise UserError(
                "the model answers nothing about the package's pictures: give texts with --calibrate FILE."
            )
        choose, measure = spread(answered[0::2], CHOOSE), spread(answered[1::2], MEASURE)
        return Samples(choose, choose, measure, answered[:facts], "its own answers")
    data = open_texts(texts)
    seen = readable(processor, data.train, max(CALIBRATE, facts))
    held_out = readable(processor, data.validation, max(MEASURE, facts))
    if not seen or not held_out:
        raise UserError(f"{texts} has no text of two tokens that the model reads: give another file.")
    return Samples(
        spread(seen, CALIBRATE),
        spread(seen, CHOOSE),
        spread(held_out, MEASURE),
        [*held_out, *seen][:facts],
        texts.name,
    )


def package_pictures() -> list[Path]:
    """Pictures that the package brings, photographs first."""
    package = Path(microvlm.__file__).parent
    return [path for pattern in _PICTURES for path in sorted(package.glob(pattern))]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly over all of them."""
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))
    return [items[place] for place in places] if len(items) else []


def readable(processor: Processor, texts: Sequence[str], count: int) -> list[Sample]:
    """The first samples among evenly chosen texts that hold no special token and have two tokens or more."""
    samples: dict[str, Sample] = {}
    for text in spread(texts, 4 * count):
        text = text[:MOST_CHARACTERS].strip()
        try:
            processor.reject_special_tokens(text)
        except UserError:
            continue
        if len(processor.text_ids(text)) > 1:
            samples.setdefault(processor.normalize_text(text), Sample(text))
    return spread(list(samples.values()), count)


def _own_answers(runtime: Runtime, processor: Processor, pictures: Sequence[Path]) -> list[Sample]:
    """A greedy caption of each picture, without empty ones."""
    prompt_text = processor.config.prompt.caption_prompt
    options = GenerationOptions(max_new_tokens=ANSWER_TOKENS, stop_tokens=processor.stop_tokens)
    samples = []
    for start in range(0, len(pictures), _BATCH):
        part = pictures[start : start + _BATCH]
        inputs = processor([prompt_text] * len(part), [[path] for path in part])
        result = generate(runtime, embed_prompt(runtime, *inputs, processor.image_id), options)
        answers = (processor.decode(tokens).strip() for tokens in result.tokens)
        samples += [Sample(text, path) for text, path in zip(answers, part, strict=True) if text]
    return samples


def encode_facts(runtime: Runtime, processor: Processor, samples: Sequence[Sample]) -> Facts:
    """A fact of each sample: of a picture, its caption; of a text, the whole, asked for by its first half."""
    cues, values = [], []
    for sample in samples:
        question, answer = _fact(processor.config, sample)
        images: Any = None if sample.picture is None else [[sample.picture]]
        prompt: Prompt = embed_prompt(runtime, *processor([question], images), processor.image_id)
        value = with_answer(runtime, prompt, processor.text_ids(answer))
        cues.append(runtime.memory_encode(*prompt)[0][0])
        values.append(runtime.memory_encode(*value)[0][0])
    return Facts(np.stack(cues), np.stack(values))


def _fact(config: MicroVLMConfig, sample: Sample) -> tuple[str, str]:
    if sample.picture is not None:
        return config.prompt.caption_prompt, sample.text
    words = sample.text.split(" ")
    half = max(1, len(words) // 2)
    return " ".join(words[:half]), " ".join(words[half:]) or sample.text
