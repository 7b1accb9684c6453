"""A store of documents over commits: JSON Lines, a document a line, with a schema version. Added to, never changed.

    {"schema": 1, "result_id": SHA-256 of the document, "added_utc": ..., "kind": ..., "document": {...}}

A document holds its own provenance: machine, versions, commit and the hash of its model. One without is not taken.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.atomic import write_file
from microvlm.bench.records import Provenance
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Sha256
from microvlm.memory.file_lock import locked

SCHEMA = 1
LARGEST_STORE = 500_000_000
"""Bytes of a store that is read: thousands of documents."""
_REMEDY = "mend or remove this line, or give another store; it was left as it is"
_THING = "the store of results"


class _Measured(msgspec.Struct, frozen=True):
    """What every stored document has."""

    report: str
    provenance: Provenance


class StoredResult(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a store."""

    schema: Annotated[int, Meta(ge=1)]
    result_id: Sha256
    added_utc: str
    kind: str
    document: dict[str, Any]

    def __post_init__(self) -> None:
        if self.schema <= SCHEMA and _identity(self.document) != self.result_id:
            raise ValueError("result_id is not the hash of document, which was changed")

    @property
    def measured(self) -> _Measured:
        return documents.convert(self.document, _Measured, "a stored document", _REMEDY)


def read_store(path: Path) -> list[StoredResult]:
    """The results of a store, oldest first. Raises UserError, which names the line, for a damaged or newer one."""
    try:
        content = documents.read_file(path, LARGEST_STORE)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give --store {path} to a measurement first.") from None
    return _parse(content, path)


def check_store(path: Path) -> None:
    """Raise UserError where a result could not be added to `path`; for use before an hour of measuring."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: its folder does not exist; make it first.")
    if path.exists():
        read_store(path)


def add_result(path: Path, document: dict[str, Any]) -> bool:
    """Add a document; False for one that is there already. The store is whole before and after. Raises UserError."""
    kind = documents.convert(document, _Measured, "a document without provenance", "measure again").report
    identity = _identity(document)
    with locked(path, thing=_THING):
        content = documents.read_file(path, LARGEST_STORE) if path.exists() else b""
        if any(result.result_id == identity for result in _parse(content, path)):
            return False
        entry = {
            "schema": SCHEMA,
            "result_id": identity,
            "added_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "kind": kind,
            "document": document,
        }
        write_file(path, content + json.dumps(entry, allow_nan=False).encode() + b"\n")
    return True


def _parse(content: bytes, path: Path) -> list[StoredResult]:
    results = []
    for number, line in enumerate(content.splitlines(), 1):
        origin = f"line {number} of {path}"
        result = documents.parse(line, StoredResult, origin, _REMEDY)
        if result.schema > SCHEMA:
            raise UserError(
                f"{origin} has schema {result.schema}; this version reads {SCHEMA}: upgrade microvlm."
            )
        results.append(result)
    return results


def _identity(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
