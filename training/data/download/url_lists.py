"""The lists of URLs that a download works through, and which of their shards are finished.

`download.json` records the lists of a folder. Lists are only ever added: rows further down the table when more pictures
are asked for, or the failures of earlier lists when those are tried again. img2dataset cuts each list into shards of
`shard_size` rows and numbers them on from list to list, so a finished shard keeps its number and is not fetched again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from microvlm.atomic import os_errors_about, write_file
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count, Size, quote
from microvlm.training.data.download.url_table import UrlTable, write_list

RECORD = "download.json"
LISTS, SHARDS = "urls", "shards"
LIST_ROWS = 500_000
"""Most rows of one list, which img2dataset reads whole: about 150 MB."""
_REMEDY = "delete the folder and begin again"
_DONE = "_stats.json"
_DIGITS = 5
"""Of a shard's number in the names of its files."""


class UrlList(msgspec.Struct, frozen=True):
    """One file below `urls/`."""

    kind: Literal["table", "retry"]
    rows: Count
    lines: Count
    """The table's lines that this list and those before it cover."""


class DownloadRecord(msgspec.Struct, frozen=True):
    """The content of `download.json`."""

    shard_size: Size
    first_url: str
    """By which another table is recognised."""
    lists: tuple[UrlList, ...] = ()
    format: Literal[1] = 1

    @property
    def lines(self) -> int:
        """Lines of the table that all lists cover."""
        return self.lists[-1].lines if self.lists else 0

    def shards(self) -> list[int]:
        """Number of shards of each list."""
        return [-(-each.rows // self.shard_size) for each in self.lists]


class Attempt(NamedTuple):
    """What became of one row in one shard."""

    shard: int
    row: int
    url: str
    caption: str
    status: str | None
    """img2dataset's word; None where it recorded nothing."""
    message: str | None


def read_record(folder: Path) -> DownloadRecord | None:
    """The record of a folder, None for a new one. Raises UserError for a damaged one."""
    try:
        return documents.load(folder / RECORD, DownloadRecord, _REMEDY)
    except FileNotFoundError:
        return None


def cover_table(folder: Path, table: UrlTable, most: int, shard_size: int) -> DownloadRecord:
    """Add lists until the first `most` lines of the table are covered -> the record. Raises UserError.

    A folder keeps the shard size that it began with.
    """
    record = read_record(folder)
    rows = table.rows(most)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{table.path} is empty: give --metadata the cc12m.tsv of the CC12M release.")
    record = record or DownloadRecord(shard_size, first[1])
    if record.first_url != first[1]:
        raise UserError(
            f"{folder} was begun with another table (its first URL is {quote(record.first_url)}): give that with "
            "--metadata, or another -o."
        )
    if record.lines >= most:
        return record
    whole_list = max(1, LIST_ROWS // record.shard_size) * record.shard_size
    wanted = (row for row in chain([first], rows) if row[0] >= record.lines)
    covered = record.lines
    while block := list(islice(wanted, whole_list)):
        covered = block[-1][0] + 1
        record = _add(folder, record, "table", iter(block), covered)
    return record if record.lines else _write(folder, record)


def add_retry(folder: Path, record: DownloadRecord, rows: Iterable[tuple[int, str, str]]) -> DownloadRecord:
    """Add lists of rows that failed -> the record. Raises UserError."""
    rows = iter(rows)
    whole_list = max(1, LIST_ROWS // record.shard_size) * record.shard_size
    while block := list(islice(rows, whole_list)):
        record = _add(folder, record, "retry", iter(block), record.lines)
    return record


def finished_shards(folder: Path) -> set[int]:
    """Numbers of the shards that img2dataset has finished."""
    names = (path.name.removesuffix(_DONE) for path in (folder / SHARDS).glob(f"*{_DONE}"))
    return {int(name) for name in names if name.isdigit()}


def pending_shards(folder: Path, record: DownloadRecord) -> list[int]:
    """Numbers of the shards that are still to be fetched, in order."""
    finished = finished_shards(folder)
    return [number for number in range(sum(record.shards())) if number not in finished]


def shard_path(folder: Path, number: int, suffix: str = ".tar") -> Path:
    """A file of a shard."""
    return folder / SHARDS / f"{number:0{_DIGITS}d}{suffix}"


def remove_unrecorded(folder: Path, record: DownloadRecord) -> None:
    """Remove lists that a killed command wrote before it recorded them: img2dataset reads whatever is there."""
    recorded = {_list_path(folder, number) for number in range(len(record.lists))}
    with os_errors_about(folder):
        for path in (folder / LISTS).glob("*.parquet"):
            if path not in recorded:
                path.unlink()


def attempts(folder: Path, record: DownloadRecord) -> Iterator[Attempt]:
    """Every row of every finished shard, in order; a row that was tried again comes again. Raises UserError."""
    import pyarrow.parquet as pq

    finished = finished_shards(folder)
    start = 0
    for number, shards in enumerate(record.shards()):
        path = _list_path(folder, number)
        if finished.isdisjoint(range(start, start + shards)):
            start += shards
            continue
        try:
            table = pq.read_table(path, columns=["row", "url", "caption"])
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({quote(error)}): {_REMEDY}.") from None
        for shard in range(shards):
            if start + shard in finished:
                outcomes = _read_outcomes(shard_path(folder, start + shard, ".parquet"))
                for row in table.slice(shard * record.shard_size, record.shard_size).to_pylist():
                    outcome = outcomes.get(row["row"], (None, None))
                    yield Attempt(start + shard, row["row"], row["url"], row["caption"], *outcome)
        start += shards


def _read_outcomes(path: Path) -> dict[int, tuple[str | None, str | None]]:
    """Row -> status and message, as img2dataset wrote them."""
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(path, columns=["row", "status", "error_message"]).to_pydict()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({quote(error)}): delete the files of that shard, and run the same command again."
        ) from None
    return {
        row: (status, message)
        for row, status, message in zip(
            columns["row"], columns["status"], columns["error_message"], strict=True
        )
    }


def _add(
    folder: Path,
    record: DownloadRecord,
    kind: Literal["table", "retry"],
    rows: Iterator[tuple[int, str, str]],
    lines: int,
) -> DownloadRecord:
    """Write one list, then record it."""
    count = write_list(rows, _list_path(folder, len(record.lists)))
    lists = (*record.lists, UrlList(kind, count, lines))
    return _write(folder, msgspec.structs.replace(record, lists=lists))


def _write(folder: Path, record: DownloadRecord) -> DownloadRecord:
    write_file(folder / RECORD, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    return record


def _list_path(folder: Path, number: int) -> Path:
    return folder / LISTS / f"{number:05d}.parquet"
