"""A leaderboard file: JSON Lines, a run a line, with a schema version. One writer at a time, written whole or not."""

from __future__ import annotations

from pathlib import Path

import msgspec

from microvlm.atomic import write_file
from microvlm.bench.training.leaderboard_records import MOST_ENTRIES, SCHEMA, Entry
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.memory.file_lock import locked

LARGEST_FILE = 50_000_000
"""Bytes of a leaderboard that is read."""
_REMEDY = "mend or remove this line, or give another file; the file was left as it is"


class _Head(msgspec.Struct, frozen=True):
    schema: int


def read_leaderboard(path: Path) -> list[Entry]:
    """The runs of a file, in the order in which they were added.

    Raises FileNotFoundError, and UserError, which names the line, for a damaged file or one of a newer version.
    """
    lines = documents.read_file(path, LARGEST_FILE).removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        return []
    if len(lines) > MOST_ENTRIES:
        raise UserError(f"{path} has more than {MOST_ENTRIES:,} lines; give another file.")
    return [_entry(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _entry(line: bytes, origin: str) -> Entry:
    version = documents.parse(line, _Head, origin, _REMEDY).schema
    if version > SCHEMA:
        raise UserError(
            f"{origin} has schema {version}, and this version reads up to {SCHEMA}: install a newer microvlm."
        )
    return documents.parse(line, Entry, origin, _REMEDY)


def check_leaderboard(path: Path) -> None:
    """Raises UserError for a file that a run could not be added to; before hours of training."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: its folder does not exist; make it first.")
    with locked(path, thing="the leaderboard"):
        _entries_or_none(path)


def add_to_leaderboard(path: Path, entry: Entry) -> bool:
    """Add a run; returns False for one that is there already, which stays.

    Raises UserError for a file that is damaged or cannot be written, which stays as it is.
    """
    with locked(path, thing="the leaderboard"):
        entries = _entries_or_none(path)
        if any(other.run_id == entry.run_id for other in entries):
            return False
        lines = [msgspec.json.encode(each) + b"\n" for each in (*entries, entry)]
        write_file(path, b"".join(lines))
    return True


def _entries_or_none(path: Path) -> list[Entry]:
    try:
        return read_leaderboard(path)
    except FileNotFoundError:
        return []
