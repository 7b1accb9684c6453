"""Pictures and questions to the arrays that a runtime takes, and token ids back to text. Needs no torch.

The tokenizer, the pixel statistics and the prompt template come from the files of a checkpoint or a bundle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.inputs.images import ImageSource, load_square
from microvlm.inputs.tokenizer import TOKENIZER, LibraryTokenizer, TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TOKENIZER", "Inputs", "Processor", "TextStream", "pad_left"]
PREPROCESSOR = "preprocessor_config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


class Inputs(NamedTuple):
    """One batch of prompts. Rows are padded on the left."""

    input_ids: np.ndarray
    """int64 [B, S], `prefix_tokens` image tokens for every image."""
    attention_mask: np.ndarray
    """int64 [B, S]."""
    pixel_values: np.ndarray | None
    """float32 [images, 3, side, side], row by row in order; None without images."""


class Processor:
    """Built from a tokenizer and a configuration, or by `from_pretrained`."""

    def __init__(
        self,
        tokenizer: TextTokenizer | Tokenizer,
        config: MicroVLMConfig,
        documents: dict[str, dict[str, Any]] | None = None,
    ):
        """`documents`: the JSON files beside the tokenizer, by file name; absent ones are made from `config`.

        Raises UserError when the tokenizer lacks a token of the template or has more tokens than the model.
        """
        self.tokenizer: TextTokenizer = _as_text_tokenizer(tokenizer)
        self.config = config
        self.image_id = self._token_id(config.prompt.image_token)
        self.eos_id = self._token_id(config.prompt.eos_token)
        self.pad_id = self._token_id(config.prompt.pad_token)
        if self.tokenizer.vocab_size > config.text.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens and the model "
                f"{config.text.vocab_size}: they belong to different models."
            )
        self._reserved = sorted(self.tokenizer.added_tokens)
        self._documents = {**self._default_documents(), **(documents or {})}
        self._read_preprocessor(self._documents[PREPROCESSOR])

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Processor:
        """Of a checkpoint or bundle directory. Raises UserError for a missing or damaged file."""
        folder = Path(directory)
        config = MicroVLMConfig.load(folder)
        tokenizer = load_tokenizer(folder)
        names = (PREPROCESSOR, GENERATION, TOKENIZER_CONFIG)
        documents = {name: _read_json(folder / name) for name in names if (folder / name).exists()}
        return cls(tokenizer, config, documents)

    def save(self, directory: str | Path) -> None:
        """tokenizer.json and the three JSON files beside it."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        for name, document in self._documents.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: generation_config.json's, and the template's end token."""
        listed = self._documents[GENERATION].get("eos_token_id", self.eos_id)
        return tuple(dict.fromkeys([*(listed if isinstance(listed, list) else [listed]), self.eos_id]))

    @property
    def max_new_tokens(self) -> int:
        """generation_config.json's default length of an answer."""
        return int(self._documents[GENERATION].get("max_new_tokens", 32))

    def pixels(self, image: ImageSource) -> np.ndarray:
        """A path, a Pillow image or a uint8 array [H, W, 3] -> normalised float32 [3, side, side]."""
        square = load_square(image, self.config.vision.image_size)
        values = np.asarray(square, np.float32).transpose(2, 0, 1) * np.float32(self._rescale)
        return (values - self._mean) / self._std

    def fold(self, text: str) -> str:
        """`text` as the model reads it: where its configuration says so, in lower case, with single blanks, and without
        full stops at its end; otherwise as it is.
        """
        if not self.config.prompt.fold_text:
            return text
        return " ".join(text.lower().split()).rstrip(". ") or text

    def check_signs(self, text: str) -> None:
        """Raises UserError for text of a user's with one of the tokenizer's added tokens in it."""
        folded = self.fold(text)  # which may make a sign of "<IMAGE>"
        for token in self._reserved:
            if token in text or token in folded:
                raise UserError(f"leave '{token}' out of the text: it is a sign of the model's own.")

    def prompt_ids(self, prompt: str, images: int) -> list[int]:
        """The template around the folded `prompt`, its image token once for every prefix embedding of every image."""
        self.check_signs(prompt)
        prompt = self.fold(prompt)
        shape = self.config.prompt
        marks = shape.image_token * (self.config.prefix_tokens * images)
        text = shape.template.replace(shape.image_token, marks).replace("{prompt}", prompt)
        return self._encode(text)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, folded, such as an answer."""
        return self._encode(self.fold(text))

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Sequence[ImageSource]] | None = None
    ) -> Inputs:
        """`images[i]` are those of `prompts[i]`; none for text alone."""
        rows = [()] * len(prompts) if images is None else images
        if not prompts or len(rows) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and images for {len(rows)}: give as many of both.")
        ids = [self.prompt_ids(prompt, len(row)) for prompt, row in zip(prompts, rows, strict=True)]
        pixels = [self.pixels(image) for row in rows for image in row]
        return Inputs(*pad_left(ids, self.pad_id), np.stack(pixels) if pixels else None)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def stream(self) -> TextStream:
        """Turns token ids, one at a time, into pieces of text."""
        return TextStream(self)

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which is what a terminal's wrong bytes become
            raise UserError("the text is not valid Unicode: write it in UTF-8.") from None
        return self.tokenizer.encode(text)

    def _token_id(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer lacks '{token}' of config.json: they belong to different models.")
        return number

    def _default_documents(self) -> dict[str, dict[str, Any]]:
        vision, prompt = self.config.vision, self.config.prompt
        side = vision.image_size
        return {
            PREPROCESSOR: {
                "image_processor_type": "ViTImageProcessor",
                "do_resize": True,
                "size": {"height": side, "width": side},
                "resample": 3,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(vision.image_mean),
                "image_std": list(vision.image_std),
            },
            GENERATION: {"eos_token_id": self.eos_id, "pad_token_id": self.pad_id, "do_sample": False},
            TOKENIZER_CONFIG: {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": prompt.eos_token,
                "pad_token": prompt.pad_token,
            },
        }

    def _read_preprocessor(self, document: dict[str, Any]) -> None:
        side = self.config.vision.image_size
        try:
            size = document.get("size", side)
            sides = set(size.values()) if isinstance(size, dict) else {size}
            self._rescale = float(document.get("rescale_factor", 1 / 255))
            self._mean, self._std = (
                np.asarray(document.get(key, default), np.float32).reshape(3, 1, 1)
                for key, default in (
                    ("image_mean", self.config.vision.image_mean),
                    ("image_std", self.config.vision.image_std),
                )
            )
        except (TypeError, ValueError, AttributeError):
            raise UserError(f"{PREPROCESSOR} is damaged: copy the checkpoint or bundle again.") from None
        if sides != {side} or not (self._std > 0).all():
            raise UserError(f"{PREPROCESSOR} does not fit config.json: they belong to different models.")


class TextStream:
    """Byte-level tokens can end inside a character; a piece is held back until its characters are whole."""

    def __init__(self, processor: Processor):
        self._processor = processor
        self._ids: list[int] = []
        self._shown = ""

    def feed(self, token: int) -> str:
        """The text that `token` completed, often one word, or nothing yet."""
        self._ids.append(token)
        text = self._processor.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def finish(self) -> str:
        """What is still held back when no token follows."""
        return self._processor.decode(self._ids)[len(self._shown) :]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> (input_ids, attention_mask), int64 [B, longest]."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        if len(row):
            ids[index, longest - len(row) :] = row
            mask[index, longest - len(row) :] = 1
    return ids, mask


def _as_text_tokenizer(tokenizer: TextTokenizer | Tokenizer) -> TextTokenizer:
    """One of the `tokenizers` library is told by its method, so that a device need not import the library."""
    is_library = hasattr(tokenizer, "get_added_tokens_decoder")
    return LibraryTokenizer(cast("Tokenizer", tokenizer)) if is_library else cast(TextTokenizer, tokenizer)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (ValueError, OSError):
        document = None
    if not isinstance(document, dict):
        raise UserError(f"{path} is damaged: copy the checkpoint or bundle again.")
    return document
