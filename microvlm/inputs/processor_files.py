"""The JSON files beside a tokenizer, as typed records: preprocessor_config.json, generation_config.json and
tokenizer_config.json, as Hugging Face writes them.

Keys that are not listed here are ignored, and null is a key's default. What a listed key asks for is computed, or
refused in a sentence with the key and its value. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta, Struct

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import PositiveNumber, Size, quote

PREPROCESSOR = "preprocessor_config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
REMEDY = "copy the checkpoint or bundle again"
DEFAULT_NEW_TOKENS = 32
_RESCALE = 1 / 255
_BICUBIC = 3
OWN_IMAGE_PROCESSOR = "MicroVLMImageProcessor"
"""The class of a bundle's own for transformers, which computes what `Processor.pixels` does."""
_IMAGE_PROCESSORS = (
    *(
        family + kind
        for family in ("ViT", "DeiT")
        for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
    ),
    OWN_IMAGE_PROCESSOR,
)

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Lengths = Size | list[Size] | dict[str, Size | None]
"""A side, [height, width], or lengths by name: height, width, shortest_edge or longest_edge."""
Channels = float | Annotated[list[float], Meta(min_length=3, max_length=3)]
"""One number for all channels, or one for each."""


class PixelStatistics(NamedTuple):
    """Pixel values are (level * rescale - mean) / std, with levels of 0 to 255; mean and std are per channel."""

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, levels: np.ndarray) -> np.ndarray:
        """Levels [3, H, W] -> float32 [3, H, W]: float32 product, difference and quotient, each rounded, in this order.

        ViTImageProcessor rounds the product of float64 to float32 instead; the results differ by the last bits.
        """
        mean, std = (np.asarray(each, np.float32).reshape(3, 1, 1) for each in (self.mean, self.std))
        return (levels.astype(np.float32) * np.float32(self.rescale) - mean) / std


class Preprocessor(Struct, frozen=True):
    """preprocessor_config.json of a ViT or DeiT processor.

    This package's own framing takes the place of `do_resize` and `do_center_crop`: the whole picture is fitted into the
    square and centred on white (`images.fit_square`). Only the side of the square is theirs.
    """

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_convert_rgb: bool | None = None
    do_resize: bool | None = None
    size: Lengths | None = None
    resample: int | None = None
    do_center_crop: bool | None = None
    crop_size: Lengths | None = None
    do_rescale: bool | None = None
    rescale_factor: PositiveNumber | None = None
    do_normalize: bool | None = None
    image_mean: Channels | None = None
    image_std: Channels | None = None

    def statistics(self, mean: Sequence[float], std: Sequence[float], origin: object) -> PixelStatistics:
        """What it says of rescaling and normalisation, with `mean` and `std` for what it does not say.

        Raises UserError for numbers that pixels cannot be divided by.
        """
        rescale = 1.0 if self.do_rescale is False else self.rescale_factor or _RESCALE
        if self.do_normalize is False:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        else:
            mean, std = _channels(self.image_mean, mean), _channels(self.image_std, std)
        with np.errstate(all="ignore"):
            white = np.float32(255) * np.float32(rescale)
            ends = [(end - np.asarray(mean, np.float32)) / np.asarray(std, np.float32) for end in (0, white)]
        if min(std) <= 0 or not np.isfinite(ends).all():
            raise UserError(
                f"{origin}: with 'rescale_factor' {rescale:g}, 'image_mean' {quote(list(mean))} and 'image_std' "
                f"{quote(list(std))} pixels are not numbers: {REMEDY}."
            )
        return PixelStatistics(rescale, tuple(map(float, mean)), tuple(map(float, std)))

    def check(self, side: int, origin: object) -> None:
        """Raise UserError for a setting that is not what `Processor.pixels` computes with a square of `side` pixels."""
        for key, computed in (
            ("image_processor_type", _IMAGE_PROCESSORS),
            ("feature_extractor_type", _IMAGE_PROCESSORS),
            ("do_convert_rgb", (True,)),
            ("do_resize", (True,)),
            ("resample", (_BICUBIC,)),
        ):
            value = getattr(self, key)
            if value is not None and value not in computed:
                words = quote(value) if isinstance(value, str) else str(value).lower()
                raise UserError(
                    f"{origin}: '{key}' is {words}, which is not computed here; "
                    f"set it to {str(computed[0]).lower()} if the model was trained so."
                )
        for key in ("size", "crop_size") if self.do_center_crop else ("size",):
            value = getattr(self, key)
            if value is not None and _sides(value) != {side}:
                raise UserError(
                    f"{origin}: '{key}' is {quote(value)}, which does not fit config.json, whose image_size is {side}: "
                    "they belong to different models."
                )


class Generation(Struct, frozen=True):
    """generation_config.json: what ends an answer. Decoding is greedy unless a caller samples."""

    eos_token_id: TokenId | list[TokenId] | None = None
    max_new_tokens: Size | None = None

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids of `eos_token_id`."""
        ids = self.eos_token_id
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)

    def check(self, vocab_size: int, positions: int, origin: object) -> None:
        """Raise UserError for ids that the model does not have and for answers longer than its positions."""
        for token in self.stop_tokens:
            if token >= vocab_size:
                raise UserError(
                    f"{origin}: 'eos_token_id' has {token}, and the model has {vocab_size} tokens: they belong to "
                    "different models."
                )
        if self.max_new_tokens is not None and self.max_new_tokens >= positions:
            raise UserError(
                f"{origin}: 'max_new_tokens' is {self.max_new_tokens}, and the model has {positions} positions: give "
                "a smaller number."
            )


class TokenizerConfig(Struct, frozen=True):
    """tokenizer_config.json, of which nothing is read here: it is for Hugging Face's tools."""


class ProcessorFiles(NamedTuple):
    """The records of the three files, and the documents as they are written again."""

    statistics: PixelStatistics
    generation: Generation
    raw: dict[str, dict[str, Any]]


def default_documents(config: MicroVLMConfig, eos_id: int, pad_id: int) -> dict[str, dict[str, Any]]:
    """File name -> the document of a model that has no such file."""
    side, prompt = config.vision.image_size, config.prompt
    return {
        PREPROCESSOR: {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": _BICUBIC,
            "do_rescale": True,
            "rescale_factor": _RESCALE,
            "do_normalize": True,
            "image_mean": list(config.vision.image_mean),
            "image_std": list(config.vision.image_std),
        },
        GENERATION: {"eos_token_id": eos_id, "pad_token_id": pad_id, "do_sample": False},
        TOKENIZER_CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": prompt.eos_token,
            "pad_token": prompt.pad_token,
        },
    }


def read_documents(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> document of those of the three files that are in `folder`. Raises UserError."""
    found = {}
    for name in (PREPROCESSOR, GENERATION, TOKENIZER_CONFIG):
        try:
            found[name] = documents.load(folder / name, dict[str, Any], REMEDY)
        except FileNotFoundError:
            continue
    return found


def check_documents(
    raw: dict[str, dict[str, Any]], config: MicroVLMConfig, folder: Path | None = None
) -> ProcessorFiles:
    """Convert the three documents to records and hold them against `config`. Missing ones have all defaults.

    `folder`: where they were read, for errors. Raises UserError.
    """

    def origin(name: str) -> object:
        return folder / name if folder else name

    def convert(name: str, kind: type) -> Any:
        return documents.convert(raw.get(name, {}), kind, origin(name), REMEDY)

    preprocessor: Preprocessor = convert(PREPROCESSOR, Preprocessor)
    generation: Generation = convert(GENERATION, Generation)
    convert(TOKENIZER_CONFIG, TokenizerConfig)
    vision, text = config.vision, config.text
    preprocessor.check(vision.image_size, origin(PREPROCESSOR))
    statistics = preprocessor.statistics(vision.image_mean, vision.image_std, origin(PREPROCESSOR))
    generation.check(text.vocab_size, text.max_position_embeddings, origin(GENERATION))
    return ProcessorFiles(statistics, generation, raw)


def read_statistics(
    path: Path, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of levels / 255 in the preprocessor_config.json of an encoder that is to be trained on.

    `mean` and `std` are the family's own, for what the file does not say. A factor other than 1 / 255 is computed into
    both. Raises FileNotFoundError and UserError.
    """
    preprocessor = documents.load(path, Preprocessor, "copy the checkpoint again")
    found = preprocessor.statistics(mean, std, path)
    share = found.rescale / _RESCALE
    return tuple(each / share for each in found.mean), tuple(each / share for each in found.std)


def _channels(value: Channels | None, default: Sequence[float]) -> Sequence[float]:
    return default if value is None else value if isinstance(value, list) else [value] * 3


def _sides(value: Lengths) -> set[int]:
    if isinstance(value, dict):
        return {each for each in value.values() if each is not None}
    return set(value) if isinstance(value, list) else {value}
