"""WebDataset shards of anyone's: tar files in which `KEY.jpg` stands beside `KEY.txt` or `KEY.json`.

img2dataset writes such shards. Members are read one after another and never extracted: their names are labels, so
`../` leads nowhere, and links and devices are not followed.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.training.data.annotations import find_annotations
from microvlm.training.data.images.conversation import CAPTION_KEYS, Columns, find_turns
from microvlm.training.data.images.folder_source import MAX_CAPTION_FILE, PICTURE_SUFFIXES
from microvlm.training.data.images.pictures import MAX_SOURCE_BYTES
from microvlm.training.data.images.source_record import (
    BAD_RECORD,
    NO_PICTURE,
    TOO_LARGE,
    BadRecord,
    Picture,
    Skip,
    SourceRecord,
)


class ShardSource:
    """The samples of tar files, in the order given."""

    kind = "shards"

    def __init__(self, paths: list[Path], columns: Columns, max_text: int):
        self.paths, self.columns, self.max_text = paths, columns, max_text
        self.name = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"

    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def records(self, start: int) -> Iterator[SourceRecord]:
        number = 0
        for path in self.paths:
            try:
                with documents.open_regular(path) as file:
                    for sample in _samples(file, path.name):
                        number += 1
                        if number > start:
                            yield self._record(path.name, sample, file)
            except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
                number += 1
                if number > start:
                    detail = f"the shard cannot be read further: {error}"
                    yield SourceRecord(path.name, skips=(Skip(BAD_RECORD, detail),))
            except FileNotFoundError:
                raise UserError(f"{path} is gone; give the shards again.") from None

    def _record(self, shard: str, sample: dict[str, Any], file: BinaryIO) -> SourceRecord:
        place = f"{shard}:{sample['__key__']}"
        try:
            names = sorted(
                (name for name in sample if f".{name}".endswith(PICTURE_SUFFIXES)), key=_numbers_in_order
            )
            if not names:
                raise BadRecord(NO_PICTURE)
            row = self._row(sample, file)
            turns, skips = find_turns(row, self.columns, len(names), self.max_text)
            pictures = tuple(
                Picture(
                    f"{sample['__key__']}.{n}", content=_read(file, sample[n], MAX_SOURCE_BYTES, TOO_LARGE)
                )
                for n in names
            )
            return SourceRecord(place, pictures, turns, skips, find_annotations(row))
        except BadRecord as problem:
            return SourceRecord(place, skips=(Skip(problem.reason, problem.detail),))

    def _row(self, sample: dict[str, Any], file: BinaryIO) -> dict[str, Any]:
        """What a sample's JSON and text files say. The text is the caption where the JSON has none."""
        row: dict[str, Any] = {}
        if "json" in sample:
            content = _read(file, sample["json"], MAX_CAPTION_FILE, BAD_RECORD)
            try:
                row = documents.parse(content, dict[str, Any], "the sample's JSON", "write one object")
            except UserError as error:
                raise BadRecord(BAD_RECORD, str(error)) from None
        said = ("turns", "answer", *((self.columns.caption,) if self.columns.caption else CAPTION_KEYS[:-1]))
        if not any(row.get(key) for key in said):
            name = next((n for n in ("txt", "caption", "text") if n in sample), None)
            if name is not None:
                content = _read(file, sample[name], MAX_CAPTION_FILE, BAD_RECORD)
                row[self.columns.caption or "caption"] = content.decode("utf-8-sig", "surrogateescape")
        return row


def _samples(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """Samples by WebDataset's rules, with a TarInfo for each file. Nothing but headers is read."""
    from webdataset.tariterators import group_by_keys

    yield from group_by_keys(_members(file, name), handler=lambda error: True)


def _members(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]
        # A sparse file claims any size with no bytes; links and devices hold nothing.
        if member.isreg() and not member.issparse():
            yield {"fname": member.name, "data": member, "__url__": name}


def _read(file: BinaryIO, member: tarfile.TarInfo, limit: int, reason: str) -> bytes:
    """The content of a member."""
    if member.size > limit:
        raise BadRecord(reason, f"a file of {member.size} bytes")
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) != member.size:
        raise BadRecord(BAD_RECORD, "the shard is cut in this sample")
    return content


def _numbers_in_order(name: str) -> tuple[Any, ...]:
    """Sorts `2.jpg` before `10.jpg`."""
    return tuple(int(part) if part.isdigit() else -1 for part in re.split(r"(\d+)", name)), name
