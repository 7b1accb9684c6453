"""What a download gave: rows tried and kept, failures by reason, bytes; and the list of failures.

A row counts once, with its last attempt. `yield.json` and `failed.jsonl` are written anew from img2dataset's own
records after every run, so that they are right however the run ended.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from microvlm.atomic import new_file, write_file
from microvlm.training.data.download import img2dataset_run
from microvlm.training.data.download.url_lists import (
    Attempt,
    DownloadRecord,
    attempts,
    finished_shards,
    pending_shards,
    shard_path,
)

YIELD, FAILED = "yield.json", "failed.jsonl"
PUBLISHED_YIELD = (0.62, 0.64)
"""Share of CC12M's URLs that still answered with a picture in 2025-26: published by others, not measured here."""
KEPT = "kept"
OPTED_OUT = "the site opted out"
_REASONS = (
    ("X-Robots-Tag", OPTED_OUT),
    (r"HTTP Error (404|410)", "not found (404, 410)"),
    (r"HTTP Error (401|403|451)", "forbidden (401, 403, 451)"),
    (r"HTTP Error 429", "too many requests (429)"),
    (r"HTTP Error 5\d\d", "error of the server (5xx)"),
    (r"HTTP Error \d+", "another HTTP status"),
    (img2dataset_run.WEB_PAGE, img2dataset_run.WEB_PAGE),
    (img2dataset_run.TOO_LARGE, img2dataset_run.TOO_LARGE),
    (r"timed out|timeout", "timed out"),
    (rf"{img2dataset_run.CUT_SHORT}|IncompleteRead", img2dataset_run.CUT_SHORT),
    (
        r"getaddrinfo|Name or service not known|No address|Temporary failure in name resolution",
        "no such host",
    ),
    (r"CERTIFICATE|SSL", "no valid certificate"),
    (r"refused|reset|unreachable|RemoteDisconnected|closed connection|No route", "no connection"),
    (r"CV_IO_MAX_IMAGE|pixels", "too many pixels"),
    (r"decod", "not a picture"),
)


class DownloadYield(NamedTuple):
    """Counts of the finished shards."""

    tried: int
    kept: int
    reasons: dict[str, int]
    """Of the rows that were not kept, the most frequent first."""
    read_bytes: int
    kept_bytes: int
    """Of the shards' archives."""
    pending_shards: int

    @property
    def share(self) -> float:
        """Rows kept of those tried; 0 where none was tried."""
        return self.kept / self.tried if self.tried else 0.0

    def document(self) -> dict[str, Any]:
        """The content of `yield.json`."""
        published = {"yield": PUBLISHED_YIELD, "of": "2025-26, by others"}
        return {**self._asdict(), "yield": round(self.share, 4), "published": published}


def reason_of(status: str | None, message: str | None) -> str:
    """The reason for which a row was not kept, out of few; `KEPT` for one that was."""
    if status == "success":
        return KEPT
    if status is None:
        return "not recorded"
    for pattern, reason in _REASONS:
        if re.search(pattern, message or "", re.IGNORECASE):
            return reason
    return "not a picture" if status == "failed_to_resize" else "another error"


def summarise(folder: Path, record: DownloadRecord) -> DownloadYield:
    """Count the finished shards of a folder, and write `yield.json` and `failed.jsonl`. Raises UserError."""
    rows = record.lines
    names: list[str] = []
    numbers: dict[str, int] = {}
    reasons = np.full(rows, -1, np.int16)
    last_shards = np.full(rows, -1, np.int32)
    for attempt in attempts(folder, record):
        reason = reason_of(attempt.status, attempt.message)
        if reason not in numbers:
            numbers[reason] = len(names)
            names.append(reason)
        reasons[attempt.row] = numbers[reason]
        last_shards[attempt.row] = attempt.shard
    counts = Counter({name: int((reasons == number).sum()) for name, number in numbers.items()})
    kept = counts.pop(KEPT, 0)
    finished = finished_shards(folder)
    result = DownloadYield(
        tried=int((reasons >= 0).sum()),
        kept=kept,
        reasons={name: count for name, count in counts.most_common() if count},
        read_bytes=sum(_read_count(folder, number) for number in finished),
        kept_bytes=sum(_size(shard_path(folder, number)) for number in finished),
        pending_shards=len(pending_shards(folder, record)),
    )
    with new_file(folder / FAILED) as path, path.open("wb") as file:
        for attempt in _failures(folder, record, last_shards):
            line = {
                "row": attempt.row,
                "url": attempt.url,
                "reason": reason_of(attempt.status, attempt.message),
                "message": attempt.message,
            }
            file.write(msgspec.json.encode(line) + b"\n")
    write_file(folder / YIELD, msgspec.json.format(msgspec.json.encode(result.document()), indent=2) + b"\n")
    return result


def retryable(folder: Path, record: DownloadRecord) -> Iterator[tuple[int, str, str]]:
    """(row, URL, caption) of the rows whose last attempt failed. A site that opted out is not asked again."""
    last_shards = np.full(record.lines, -1, np.int32)
    for attempt in attempts(folder, record):
        last_shards[attempt.row] = attempt.shard
    for attempt in _failures(folder, record, last_shards):
        if reason_of(attempt.status, attempt.message) != OPTED_OUT:
            yield attempt.row, attempt.url, attempt.caption


def _failures(folder: Path, record: DownloadRecord, last_shards: np.ndarray) -> Iterator[Attempt]:
    """The last attempts that failed."""
    for attempt in attempts(folder, record):
        if attempt.status != "success" and last_shards[attempt.row] == attempt.shard:
            yield attempt


def _read_count(folder: Path, number: int) -> int:
    """Bytes that were read for a shard; 0 where a run on other machines did not leave the count here."""
    with suppress(OSError, ValueError):
        return int(shard_path(folder, number, img2dataset_run.BYTES_SUFFIX).read_text("ascii"))
    return 0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
