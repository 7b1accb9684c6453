"""Text to token ids and back: by mapped tables where a folder has them, else by the `tokenizers` library.

Both give the same ids. The library holds a vocabulary of 151,643 tokens in 60 MB of anonymous memory, the tables in
next to none (`tokenizer_tables`). Knows no prompt, no picture and no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from microvlm.errors import UserError
from microvlm.inputs.tokenizer_tables import TABLES, TOKENIZER, TableTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer(Protocol):
    """What a processor needs of a tokenizer."""

    @property
    def description(self) -> str:
        """Which code runs, for `microvlm info`."""

    @property
    def identity(self) -> str:
        """sha256 of the tokenizer.json behind it: two tokenizers with one identity give the same ids."""

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""

    @property
    def added_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that are found in a text before it is split into words."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing put around it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens and unknown ids left out; U+FFFD for bytes that are no UTF-8."""

    def token_to_id(self, token: str) -> int | None:
        """Id of an added token by its text, or None."""

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, and the tables where they are used."""


class LibraryTokenizer:
    """Any tokenizer.json, by the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer, document: bytes | None = None, remark: str = ""):
        """`document`: the bytes of the file that `tokenizer` was read from. `remark`: why the library is used."""
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._document = document
        self.description = "the tokenizers library" + (f" ({remark})" if remark else "")
        decoder = tokenizer.get_added_tokens_decoder()
        self.added_tokens = {token.content: number for number, token in decoder.items()}

    @classmethod
    def from_file(cls, path: Path, remark: str = "") -> LibraryTokenizer:
        """Raises UserError when `path` is missing or damaged."""
        from tokenizers import Tokenizer

        if not path.is_file():
            raise UserError(f"{path} is missing: copy the checkpoint or bundle again.")
        document = path.read_bytes()
        try:
            return cls(Tokenizer.from_str(document.decode()), document, remark)
        except Exception:  # tokenizers raises plain Exception
            raise UserError(f"{path} is damaged: copy the checkpoint or bundle again.") from None

    @property
    def identity(self) -> str:
        document = self._tokenizer.to_str().encode() if self._document is None else self._document
        return hashlib.sha256(document).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def save(self, directory: Path) -> None:
        if self._document is None:
            self._tokenizer.save(str(directory / TOKENIZER))
        else:
            (directory / TOKENIZER).write_bytes(self._document)


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Of a checkpoint or bundle. Raises UserError for a missing or damaged file.

    Tables that were made from another tokenizer.json than the one beside them (by its bytes) are left alone.
    """
    path = directory / TOKENIZER
    if (directory / TABLES).is_file():
        tables = TableTokenizer.open(directory / TABLES)
        if path.is_file() and path.stat().st_size == tables.source_bytes:
            return tables
        return LibraryTokenizer.from_file(path, f"{TABLES} belongs to another {TOKENIZER}")
    return LibraryTokenizer.from_file(path, f"no {TABLES} here")
