"""The counted and timed phases: decoding a photograph, and the graphs of a bundle on random inputs of a fixed size.

No graph looks at values, so that random weights and a model without a tokenizer do as well as a trained one.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from microvlm.bench.photograph_reader import read_photographs
from microvlm.errors import UserError
from microvlm.inputs.images import load_square
from microvlm.runtime import MemoryReading, Past, Runtime

PICTURE = "picture"
"""Decoding a JPEG of 3 megapixels and scaling it to the encoder's square: Pillow's work, without a graph."""
PHASES = (
    "vision",
    "prefill",
    "memory_encode",
    "memory_read",
    "memory_write",
    "memory_forget",
    "decode",
    PICTURE,
)
"""`prefill` embeds and decodes the prompt with the image's prefix; `decode` is one new token, embedding included."""
PICTURE_SIZE = (2048, 1536)
"""Pixels of the JPEG: what a camera of 3 megapixels writes."""
PICTURE_QUALITY = 90
GRAPHS = {
    "vision": ("vision_encoder",),
    "prefill": ("embed_tokens", "decoder_model_merged"),
    "memory_encode": ("memory_encode",),
    "memory_read": ("memory_read",),
    "memory_write": ("memory_write",),
    "memory_forget": ("memory_forget",),
    "decode": ("embed_tokens", "decoder_model_merged"),
    PICTURE: (),
}
"""The graphs that each phase runs."""


@dataclass(frozen=True)
class Scenario:
    """One image, a question about it, and an answer."""

    prompt_tokens: int = 15
    """Number of text tokens; the image's prefix comes before them."""
    answer_tokens: int = 50
    counted_tokens: int = 4
    """Decoded where instructions are counted or a phase is timed: every token costs the same but for the cache."""

    def __post_init__(self) -> None:
        for flag in ("prompt_tokens", "answer_tokens", "counted_tokens"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}; give 1 or more.")


class Work:
    """Prepares every phase's inputs by running those before it. `run(phase)` does it once."""

    def __init__(self, runtime: Runtime, scenario: Scenario):
        self._runtime, self._scenario = runtime, scenario
        config = runtime.config
        rng = np.random.default_rng(0)
        side = config.vision.image_size
        self._pixels = rng.standard_normal((1, 3, side, side), np.float32)
        self._ids = rng.integers(0, config.text.vocab_size, (1, scenario.prompt_tokens))
        self._prefix = runtime.encode_image(self._pixels)
        length = self._prefix.shape[1] + scenario.prompt_tokens
        self._embeds = np.concatenate([self._prefix, runtime.embed_tokens(self._ids)], 1)
        self._mask = np.ones((1, length), np.int64)
        self._state = runtime.memory_prior()
        self._latent, self._key = runtime.memory_encode(self._embeds, self._mask)
        self._logits, self._past = self._prefill()
        self._jpeg = jpeg()
        self._actions: dict[str, Callable[[], Any]] = {
            "vision": lambda: runtime.encode_image(self._pixels),
            "prefill": self._prefill,
            "memory_encode": lambda: runtime.memory_encode(self._embeds, self._mask),
            "memory_read": self._read,
            "memory_write": lambda: runtime.memory_write(self._key, self._latent, self._state),
            "memory_forget": lambda: runtime.memory_forget(self._key, self._latent, self._state),
            "decode": self._decode,
            PICTURE: self._decode_picture,
        }

    def run(self, phase: str) -> None:
        self._actions[phase]()

    def repeats_in(self, phase: str) -> int:
        """Operations per `run`, to divide counts and times by: `decode` does several tokens."""
        return self._scenario.counted_tokens if phase == "decode" else 1

    def is_finite(self) -> bool:
        """Whether the logits of the last token are finite."""
        return bool(np.isfinite(self._logits).all())

    def _read(self) -> MemoryReading:
        return self._runtime.memory_read(self._key, self._latent, self._state)

    def _prefill(self) -> tuple[np.ndarray, Past]:
        embeds = np.concatenate([self._prefix, self._runtime.embed_tokens(self._ids)], 1)
        length = embeds.shape[1]
        positions = np.arange(1, length + 1)[None]
        return self._runtime.decode(embeds, _mask(length), positions, self._runtime.empty_slot(1), 1)

    def _decode_picture(self) -> None:
        vision = self._runtime.config.vision
        load_square(self._jpeg, vision.image_size, vision.resize == "stretch")

    def _decode(self) -> None:
        """Greedy; the logits and the cache of the prefill stay for the next time."""
        logits, past, length = self._logits, self._past, self._embeds.shape[1]
        for step in range(1, self._scenario.counted_tokens + 1):
            embeds = self._runtime.embed_tokens(logits[:, -1].argmax(-1)[:, None])
            logits, past = self._runtime.decode(
                embeds, _mask(length + step), np.array([[length + step]]), past, 1
            )


def jpeg() -> bytes:
    """A JPEG of PICTURE_SIZE with the detail of photographs, which decoding depends on: the bench's, in rows of 4."""
    columns = 4
    pictures = read_photographs()
    width, height = PICTURE_SIZE[0] // columns, PICTURE_SIZE[1] * columns // len(pictures)
    sheet = Image.new("RGB", PICTURE_SIZE)
    for number, picture in enumerate(pictures):
        with Image.open(picture.path) as image:
            tile = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(tile, (number % columns * width, number // columns * height))
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=PICTURE_QUALITY)
    return file.getvalue()


def _mask(length: int) -> np.ndarray:
    """Nothing is remembered: column 0, the memory's, is off."""
    mask = np.ones((1, length + 1), np.int64)
    mask[0, 0] = 0
    return mask
