"""Captions in a table: CSV, TSV, JSON lines, or one JSON document. Reads row by row, so that one bad row is one skip.

Neither `datasets` nor pandas reads these: both take a whole file for bad because of one row, guess types ("NA" and
"001" are captions), and cannot say on which line a row stands.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.training.data.annotations import find_annotations
from microvlm.training.data.images.conversation import IMAGE_KEYS, Columns, find_images, find_turns
from microvlm.training.data.images.source_record import (
    BAD_RECORD,
    NOT_UTF8,
    URL,
    BadRecord,
    Picture,
    Skip,
    SourceRecord,
)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
MAX_LINE_BYTES = 1_000_000
"""The longest line of a table that is read."""
MAX_JSON_BYTES = 512_000_000
"""The largest JSON document that is read whole; a larger set belongs into JSON lines."""
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


class TableSource:
    """The rows of one file. Paths in it are relative to its folder; absolute ones and `..` are the user's to write."""

    kind = "table"

    def __init__(self, path: Path, columns: Columns, max_text: int):
        self.path, self.columns, self.max_text = path, columns, max_text
        self.name = path.name

    def identity(self) -> str:
        digest = hashlib.sha256()
        with documents.open_regular(self.path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def records(self, start: int) -> Iterator[SourceRecord]:
        for number, (line, row) in enumerate(self._rows()):
            if number >= start:
                yield self._record(f"{self.name}:{line}", row)

    def _record(self, place: str, row: dict[str, Any] | Skip) -> SourceRecord:
        if isinstance(row, Skip):
            return SourceRecord(place, skips=(row,))
        try:
            pictures = tuple(self._picture(value) for value in find_images(row, self.columns))
            turns, skips = find_turns(row, self.columns, len(pictures), self.max_text)
            return SourceRecord(place, pictures, turns, skips, find_annotations(row))
        except BadRecord as problem:
            return SourceRecord(place, skips=(Skip(problem.reason, problem.detail),))

    def _picture(self, value: Any) -> Picture:
        if not isinstance(value, str):
            raise BadRecord(BAD_RECORD, "a picture must be the path of a file")
        if _URL.match(value):
            raise BadRecord(URL, value[:200])
        return Picture(value, path=self.path.parent / value)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
        """(line, row) of the file. Line numbers count from 1; in a JSON document, rows do."""
        suffix = self.path.suffix.lower()
        if suffix in (".csv", ".tsv"):
            yield from self._csv_rows("\t" if suffix == ".tsv" else None)
        elif suffix == ".json" and not self._holds_lines():
            yield from self._document_rows()
        else:
            yield from self._json_lines()

    def _holds_lines(self) -> bool:
        """Whether a .json file holds JSON lines: its first line is a whole object of several."""
        with documents.open_regular(self.path) as file:
            first = file.readline(MAX_LINE_BYTES)
            if not first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") or not file.read(1):
                return False
        try:
            msgspec.json.decode(first.removeprefix(b"\xef\xbb\xbf"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        return True

    def _json_lines(self) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
        with documents.open_regular(self.path) as file:
            for number, line in _bounded_lines(file):
                if line is None:
                    yield number, Skip(BAD_RECORD, f"a line of more than {MAX_LINE_BYTES} bytes")
                elif line.strip():
                    yield number, _parse_row(line)

    def _document_rows(self) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
        remedy = "give a list of records, or JSON lines"
        content = documents.read_file(self.path, MAX_JSON_BYTES)
        document: Any = documents.parse(content, list | dict, self.path, remedy)  # type: ignore[arg-type]
        if isinstance(document, dict):
            lists = {key: value for key, value in document.items() if isinstance(value, list)}
            if {"images", "annotations"} <= set(lists):
                document = _join_coco(lists["images"], lists["annotations"])
            elif len(lists) == 1:
                (document,) = lists.values()
            else:
                raise UserError(f"{self.path} is not a list of records: {remedy}.")
        for number, row in enumerate(document, 1):
            yield number, row if isinstance(row, dict) else Skip(BAD_RECORD, "not an object")

    def _csv_rows(self, delimiter: str | None) -> Iterator[tuple[int, dict[str, Any] | Skip]]:
        with documents.open_regular(self.path) as file:
            lines = _CsvLines(file)
            header = next(lines, "").removeprefix("\ufeff")
            if delimiter is None:
                delimiter = max(",;\t", key=header.count)
            names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
            self._check_header(names)
            reader = csv.reader(lines, delimiter=delimiter)
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield lines.number, Skip(BAD_RECORD, str(error))
                    continue
                if lines.too_long:
                    lines.too_long = False
                    yield lines.number, Skip(BAD_RECORD, f"a line of more than {MAX_LINE_BYTES} bytes")
                elif len(cells) != len(names) and cells:
                    yield lines.number, Skip(BAD_RECORD, f"{len(cells)} cells under {len(names)} columns")
                elif cells:
                    yield lines.number, {n: c.strip() for n, c in zip(names, cells, strict=True) if c.strip()}

    def _check_header(self, names: list[str]) -> None:
        wanted = (self.columns.image,) if self.columns.image else IMAGE_KEYS
        if not any(name in names for name in wanted):
            found = documents.quote(", ".join(names)) if any(names) else "no columns"
            raise UserError(
                f"{self.path} has no column {' or '.join(wanted[:6])} (it has {found}); its first line must name "
                "the columns, or give --image-column and --caption-column."
            )
        if self.columns.caption and self.columns.caption not in names:
            raise UserError(
                f"{self.path} has no column {self.columns.caption}; name it with --caption-column."
            )


class _CsvLines:
    """Lines of a file as text for `csv`; bytes that are no UTF-8 stay recognisable. `number` counts from 1."""

    def __init__(self, file: BinaryIO):
        self._lines = _bounded_lines(file)
        self.number, self.too_long = 0, False

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if line is None:
            self.too_long = True
            return "\n"
        return line.decode("utf-8", "surrogateescape")


def _bounded_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line), where None stands for a line that is too long to be read."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield number, None


def _parse_row(line: bytes) -> dict[str, Any] | Skip:
    try:
        line.decode()
    except UnicodeDecodeError:
        return Skip(NOT_UTF8, "the line is not UTF-8")
    try:
        return documents.parse(line, dict[str, Any], "the line", "write one JSON object a line")
    except UserError as error:
        return Skip(BAD_RECORD, str(error))


def _join_coco(images: list[Any], annotations: list[Any]) -> list[dict[str, Any]]:
    """COCO's two lists as one: each picture with all its captions."""
    captions: dict[Any, list[Any]] = {}
    for row in annotations:
        if isinstance(row, dict) and isinstance(row.get("image_id"), int | str) and row.get("caption"):
            captions.setdefault(row["image_id"], []).append(row["caption"])
    rows = [row for row in images if isinstance(row, dict) and isinstance(row.get("id"), int | str)]
    return [{"file_name": row.get("file_name"), "captions": captions.get(row["id"], [])} for row in rows]
