"""CC12M as ready shards: a crawl of 2021 that others keep on the Hugging Face hub in WebDataset's format.

Shards are fetched whole, in order, until they hold as many pictures as were asked for; each resumes and is compared
with the hub's hash. The commit of the first listing is recorded, and later runs take the same one.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from microvlm.atomic import os_errors_about, write_file
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count
from microvlm.training.data.download.hub_files import HubListing, fetch_file, list_files

REPOSITORY = "pixparse/cc12m-wds"
FOLDER, RECORD = "ready", "ready.json"
_PATTERNS = ("*.tar",)
_REMEDY = "delete it and run the same command again"


class ReadyRecord(msgspec.Struct, frozen=True):
    """The content of `ready.json`: where the shards came from, and how many pictures each has."""

    repository: str
    revision: str
    pictures: dict[str, Count] = {}
    """Of the shards that are there, by file name."""


class ReadyShards(NamedTuple):
    """Shards on the disk."""

    paths: tuple[Path, ...]
    pictures: int
    nbytes: int


def list_shards(folder: Path, revision: str | None = None) -> HubListing:
    """The shards at the recorded commit, at `revision`, or at the newest commit, which is then recorded.

    Raises HubUnreachable and UserError.
    """
    record = _read(folder)
    if record is not None and revision is not None and not record.revision.startswith(revision):
        raise UserError(f"{folder} holds revision {record.revision}: give another -o for {revision}.")
    listing = list_files(REPOSITORY, revision or (record.revision if record else None), _PATTERNS, "dataset")
    if not listing.files:
        raise UserError(f"{REPOSITORY} at {listing.commit} has no shards: give another --revision.")
    if record is None:
        _write(folder, ReadyRecord(REPOSITORY, listing.commit))
    return HubListing(
        listing.repository,
        listing.kind,
        listing.commit,
        tuple(sorted(listing.files, key=lambda file: file.name)),
    )


def fetch_shards(folder: Path, listing: HubListing, most: int) -> ReadyShards:
    """Fetch shards in order until they hold `most` pictures -> those shards. Raises HubUnreachable and UserError."""
    paths: list[Path] = []
    total = nbytes = 0
    target = folder / FOLDER
    with os_errors_about(target):
        target.mkdir(parents=True, exist_ok=True)
    for file in listing.files:
        if total >= most:
            break
        path = target / file.name
        record = _read(folder) or ReadyRecord(REPOSITORY, listing.commit)
        if file.name in record.pictures and path.is_file() and path.stat().st_size == file.nbytes:
            count = record.pictures[file.name]  # was compared when it was fetched
        else:
            fetch_file(listing, file, target)
            count = _count_pictures(path)
            _write(folder, msgspec.structs.replace(record, pictures={**record.pictures, file.name: count}))
            note(f"{path}: {count:,} pictures")
        paths.append(path)
        total += count
        nbytes += file.nbytes
    return ReadyShards(tuple(paths), total, nbytes)


def _count_pictures(path: Path) -> int:
    """Members of a tar file that are pictures by their names. Raises UserError for a damaged one."""
    try:
        with tarfile.open(path) as archive:
            return sum(member.name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")) for member in archive)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is no whole tar file ({error}): {_REMEDY}.") from None


def _read(folder: Path) -> ReadyRecord | None:
    try:
        return documents.load(folder / RECORD, ReadyRecord, _REMEDY)
    except FileNotFoundError:
        return None


def _write(folder: Path, record: ReadyRecord) -> None:
    with os_errors_about(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content: Any = msgspec.json.encode(record)
    write_file(folder / RECORD, msgspec.json.format(content, indent=2) + b"\n")
