"""Tokenizers: text to token ids and back, by tables where a folder has them, else by the `tokenizers` library.

Both give the same ids. The library needs 60 MB of anonymous memory for a vocabulary of 151,643 tokens, the tables
4 MB (`tokenizer_tables`). Knows no prompt, image or model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.inputs.tokenizer_document import MAX_TOKENIZER_BYTES
from microvlm.inputs.tokenizer_steps import reason_for_a_child
from microvlm.inputs.tokenizer_tables import TABLES, TOKENIZER, TableTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer(Protocol):
    """The interface that a processor needs of a tokenizer."""

    @property
    def description(self) -> str:
        """Name of the implementation, for `microvlm info`."""

    @property
    def identity(self) -> str:
        """sha256 of tokenizer.json. Tokenizers with the same identity give the same ids."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""

    @property
    def added_tokens(self) -> dict[str, int]:
        """Text -> id of the added tokens, which are matched before a text is split into words."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens around it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens and unknown ids. Bytes that are not UTF-8 become U+FFFD."""

    def token_to_id(self, token: str) -> int | None:
        """Id of an added token by its text, or None."""

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, and the tables if they are used."""


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library in this process: of a trusted source, or of `tokenizer_steps`.

    What the library cannot encode or decode is a UserError.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        document: bytes | None = None,
        remark: str = "",
        origin: str | Path = TOKENIZER,
    ):
        """`document`, `origin`: the bytes and the name of its file. `remark`: why no tables are used."""
        self._tokenizer, self._origin = tokenizer, origin
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._document = document
        self.description = "the tokenizers library" + (f" ({remark})" if remark else "")
        decoder = tokenizer.get_added_tokens_decoder()
        self.added_tokens = {token.content: number for number, token in decoder.items()}

    @classmethod
    def from_file(cls, path: Path, remark: str = "") -> LibraryTokenizer:
        """Load a tokenizer.json of a trusted source. Raises UserError when it is missing or damaged."""
        return cls._from_bytes(read_tokenizer(path), path, remark)

    @classmethod
    def _from_bytes(cls, document: bytes, path: Path, remark: str) -> LibraryTokenizer:
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(document.decode()), document, remark, path)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the library raises plain Exception, and panics of Rust as BaseException
            raise UserError(f"{path} is damaged: copy the checkpoint or bundle again.") from None

    @property
    def identity(self) -> str:
        document = self._tokenizer.to_str().encode() if self._document is None else self._document
        return hashlib.sha256(document).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        with self._failures_as_sentences("this text"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        with self._failures_as_sentences("these token ids"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def save(self, directory: Path) -> None:
        if self._document is None:
            self._tokenizer.save(str(directory / TOKENIZER))
        else:
            (directory / TOKENIZER).write_bytes(self._document)

    @contextmanager
    def _failures_as_sentences(self, subject: str) -> Iterator[None]:
        """Raise what the library raises as UserError: plain Exception, and panics of Rust as BaseException."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, TypeError):  # a TypeError is the calling program's mistake
            raise
        except BaseException:
            raise UserError(
                f"{self._origin}: the tokenizers library fails on {subject}; take another model."
            ) from None


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Load the tokenizer of a checkpoint or bundle. Raises UserError for a missing or damaged file.

    Tables that were built from another tokenizer.json than the one beside them (by its size), and tables with patterns
    that are not known, are not used. A tokenizer.json with unknown patterns or steps runs in a process of its own.
    """
    path = directory / TOKENIZER
    remark = f"no {TABLES} here"
    if (directory / TABLES).is_file():
        tables = TableTokenizer.open(directory / TABLES)
        if not path.is_file() or path.stat().st_size != tables.source_bytes:
            remark = f"{TABLES} belongs to another {TOKENIZER}"
        elif not tables.has_known_patterns:
            remark = f"{TABLES} has patterns that are not known"
        else:
            return tables
    document = read_tokenizer(path)
    reason = reason_for_a_child(document, path)
    if reason:
        from microvlm.inputs.tokenizer_child import ChildTokenizer

        return ChildTokenizer(document, path, reason)
    return LibraryTokenizer._from_bytes(document, path, remark)


def read_tokenizer(path: Path) -> bytes:
    """The bytes of a tokenizer.json. Raises UserError."""
    try:
        return documents.read_file(path, MAX_TOKENIZER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the checkpoint or bundle again.") from None
