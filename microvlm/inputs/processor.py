"""The processor: images and prompts to the arrays that a runtime takes, and token ids back to text. Needs no torch.

Tokenizer, pixel statistics and prompt template come from the files of a checkpoint or a bundle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.inputs.images import ImageSource, load_square
from microvlm.inputs.processor_files import (
    DEFAULT_NEW_TOKENS,
    GENERATION,
    PREPROCESSOR,
    TOKENIZER_CONFIG,
    check_documents,
    default_documents,
    read_documents,
)
from microvlm.inputs.tokenizer import TOKENIZER, LibraryTokenizer, TextTokenizer, load_tokenizer
from microvlm.sources.model_source import find_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "GENERATION",
    "PREPROCESSOR",
    "TOKENIZER",
    "TOKENIZER_CONFIG",
    "Inputs",
    "Processor",
    "TextStream",
    "pad_left",
]
MAX_CHARACTERS_PER_TOKEN = 16
"""Far above the average of any text. Longer texts are refused before a tokenizer spends 100 bytes per character."""


class Inputs(NamedTuple):
    """A batch of tokenized prompts and their images. Rows are padded on the left."""

    input_ids: np.ndarray
    """int64 [B, S], with `prefix_tokens` image tokens per image."""
    attention_mask: np.ndarray
    """int64 [B, S], 0 where a row is padded."""
    pixel_values: np.ndarray | None
    """float32 [images, 3, side, side], the images of row 0 first; None without images."""


class Processor:
    """Converts images and prompts to model inputs, and token ids to text. Build it with `from_pretrained`."""

    def __init__(
        self,
        tokenizer: TextTokenizer | Tokenizer,
        config: MicroVLMConfig,
        documents: dict[str, dict[str, Any]] | None = None,
        folder: Path | None = None,
    ):
        """`documents`: the JSON files beside the tokenizer, by file name. Missing ones are derived from `config`.
        `folder`: where they were read, for errors.

        Raises UserError when the tokenizer lacks a token of the template or has more tokens than the model, and for
        documents that are damaged, belong to another model or ask for what is not computed here.
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
        self._special_tokens = sorted(self.tokenizer.added_tokens)
        defaults = default_documents(config, self.eos_id, self.pad_id)
        self._files = check_documents({**defaults, **(documents or {})}, config, folder)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Processor:
        """Load the processor of a checkpoint or a bundle: a folder, a hub id or a bundled name.

        Raises UserError for a missing or damaged file.
        """
        folder = find_folder(directory)
        config = MicroVLMConfig.load(folder)
        tokenizer = load_tokenizer(folder)
        return cls(tokenizer, config, read_documents(folder), folder)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and the three JSON files beside it."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        for name, document in self._files.raw.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: those of generation_config.json and the template's end token."""
        return tuple(dict.fromkeys([*self._files.generation.stop_tokens, self.eos_id]))

    @property
    def max_new_tokens(self) -> int:
        """The default length of an answer, from generation_config.json."""
        return self._files.generation.max_new_tokens or DEFAULT_NEW_TOKENS

    def pixels(self, image: ImageSource) -> np.ndarray:
        """Load, scale and normalise an image -> float32 [3, side, side]. Raises UserError for a bad one."""
        vision = self.config.vision
        square = load_square(image, vision.image_size, vision.resize == "stretch")
        return self._files.statistics.normalize(np.asarray(square).transpose(2, 0, 1))

    def normalize_text(self, text: str) -> str:
        """Text as the model reads it: lower case, single blanks and no final full stops if `fold_text` is set, else
        unchanged.
        """
        if not self.config.prompt.fold_text:
            return text
        return " ".join(text.lower().split()).rstrip(". ") or text

    def reject_special_tokens(self, text: str) -> None:
        """Raise UserError if a user's text contains a special token, such as `<image>`."""
        normalized = self.normalize_text(text)  # lower case may turn "<IMAGE>" into a special token
        for token in self._special_tokens:
            if token in text or token in normalized:
                raise UserError(f"leave '{token}' out of the text: it is one of the model's special tokens.")

    def prompt_ids(self, prompt: str, images: int) -> list[int]:
        """Token ids of the template around the normalized prompt, with `prefix_tokens` image tokens per image.

        Raises UserError for special tokens in the prompt, for text that is not valid Unicode, and for images or text
        that are far more than the model's positions.
        """
        self._check_length(prompt)
        self.reject_special_tokens(prompt)
        prompt = self.normalize_text(prompt)
        config = self.config.prompt
        count, positions = self.config.prefix_tokens * images, self.config.text.max_position_embeddings
        if count >= positions:
            raise UserError(
                f"{images} images are {count} tokens, more than the {positions - 1} of this model: give fewer."
            )
        image_tokens = config.image_token * count
        text = config.template.replace(config.image_token, image_tokens).replace("{prompt}", prompt)
        ids = self._encode(text)
        if ids.count(self.image_id) != count:
            raise UserError(
                f"the tokenizer splits '{config.image_token}' of config.json: they belong to different models."
            )
        return ids

    def text_ids(self, text: str, after_blank: bool = False) -> list[int]:
        """Token ids of normalized plain text, such as an answer. Raises UserError.

        after_blank : with a blank before the text, so that a word has the same tokens as inside of a sentence.
        """
        self._check_length(text)
        return self._encode(f"{' ' if after_blank else ''}{self.normalize_text(text)}")

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Sequence[ImageSource]] | None = None
    ) -> Inputs:
        """Tokenize prompts and load their images: `images[i]` belong to `prompts[i]`. Raises UserError."""
        rows = [()] * len(prompts) if images is None else images
        if not prompts or len(rows) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts and images for {len(rows)} prompts: give as many of both."
            )
        ids = [self.prompt_ids(prompt, len(row)) for prompt, row in zip(prompts, rows, strict=True)]
        pixels = [self.pixels(image) for row in rows for image in row]
        return Inputs(*pad_left(ids, self.pad_id), np.stack(pixels) if pixels else None)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids)

    def stream(self) -> TextStream:
        """A new converter of token ids, one at a time, to pieces of text."""
        return TextStream(self)

    def _check_length(self, text: str) -> None:
        positions = self.config.text.max_position_embeddings
        if len(text) > MAX_CHARACTERS_PER_TOKEN * positions:
            raise UserError(
                f"the text has {len(text)} characters, more than the {positions - 1} tokens of this model hold; "
                "shorten it."
            )

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, as Python decodes a terminal's invalid bytes
            raise UserError("the text is not valid Unicode: write it in UTF-8.") from None
        return self.tokenizer.encode(text)

    def _token_id(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer lacks '{token}' of config.json: they belong to different models.")
        return number


class TextStream:
    """Converts token ids to text one at a time. Tokens can end inside a character: incomplete ones are held back."""

    def __init__(self, processor: Processor):
        self._processor = processor
        self._ids: list[int] = []
        self._text = ""

    def feed(self, token: int) -> str:
        """The text that `token` completes, often one word; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._processor.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        piece, self._text = text[len(self._text) :], text
        return piece

    def finish(self) -> str:
        """The text that is still held back after the last token."""
        return self._processor.decode(self._ids)[len(self._text) :]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows of ids on the left -> (input_ids, attention_mask), int64 [B, longest]."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        if len(row):
            ids[index, longest - len(row) :] = row
            mask[index, longest - len(row) :] = 1
    return ids, mask


def _as_text_tokenizer(tokenizer: TextTokenizer | Tokenizer) -> TextTokenizer:
    """Wrap a tokenizer of the `tokenizers` library. Recognised by a method, because a device may lack the library."""
    is_library = hasattr(tokenizer, "get_added_tokens_decoder")
    return LibraryTokenizer(cast("Tokenizer", tokenizer)) if is_library else cast(TextTokenizer, tokenizer)
