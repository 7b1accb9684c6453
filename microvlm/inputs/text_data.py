"""Plain texts to train and score a decoder on: captions or other lines of JSON, and prose. Knows no tokens.

A file is read whole. Of JSON lines (also packed: `.jsonl.gz`) each has `text`, or `captions` as a list; the texts of a
line are in one split. Prose (`.txt`) is cut into pieces of whole paragraphs. A split follows a hash of the content.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from microvlm.errors import UserError
from microvlm.formats import documents

MOST_BYTES = 200_000_000
VALIDATION_SHARE = 0.1
PIECE_CHARACTERS = 600
"""Paragraphs of prose are joined until a piece has so many; a longer paragraph is a piece of its own."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class TextData:
    """The texts of one file."""

    path: Path
    train: tuple[str, ...]
    validation: tuple[str, ...]
    sha256: str
    """Of the file."""

    def texts(self, split: str) -> tuple[str, ...]:
        """The texts of `train` or `validation`."""
        return {"train": self.train, "validation": self.validation}[split]


def is_text_file(path: Path) -> bool:
    """Whether a path names a file that `open_texts` reads."""
    return path.name.lower().endswith(SUFFIXES)


def open_texts(path: Path) -> TextData:
    """Read a file. Raises UserError for one that is missing, damaged, of another kind or too small to be split."""
    if not is_text_file(path) or path.is_dir():
        raise UserError(f"{path} is no text: give a file that ends in {', '.join(SUFFIXES)}.")
    try:
        content = documents.read_file(path, MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a file with texts.") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if path.name.lower().endswith(".gz"):
        content = _unpacked(content, path)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: write it in UTF-8.") from None
    records = list(_pieces(text)) if path.suffix.lower() == ".txt" else list(_lines(text, path))
    splits: dict[bool, list[str]] = {False: [], True: []}
    for record in records:
        digest = hashlib.sha256("\n".join(record).encode()).digest()
        splits[int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64] += record
    if not splits[False] or not splits[True]:
        raise UserError(f"{path} has too few texts to hold some back: give at least a few dozen.")
    return TextData(path, tuple(splits[False]), tuple(splits[True]), sha256)


def _unpacked(content: bytes, path: Path) -> bytes:
    try:
        with gzip.open(io.BytesIO(content)) as stream:
            text = stream.read(MOST_BYTES + 1)
    except (OSError, EOFError):
        raise UserError(f"{path} is damaged: it cannot be unpacked; get it again.") from None
    if len(text) > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES // 10**6} MB of text: give a smaller file.")
    return text


def _lines(text: str, path: Path) -> Iterator[list[str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found = row["captions"] if "captions" in row else [row["caption" if "caption" in row else "text"]]
            texts = [str(each).strip() for each in found if isinstance(each, str)]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"line {number} of {path} has no text: write "
                '{"text": ...}, {"caption": ...} or {"captions": [...]}.'
            ) from None
        texts = [each for each in texts if each]
        if texts:
            yield texts


def _pieces(text: str) -> Iterator[list[str]]:
    piece: list[str] = []
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        words = " ".join(paragraph.split())
        if not words:
            continue
        piece.append(words)
        if sum(map(len, piece)) >= PIECE_CHARACTERS:
            yield [" ".join(piece)]
            piece = []
    if piece:
        yield [" ".join(piece)]
