"""The table of CC12M, a URL and a caption a line, and the lists of rows that img2dataset is given.

The release is one file of 12.4 million lines and 2.7 GB. Only the first lines are fetched where only those are needed,
and a later call goes on there. A list is a Parquet file with the columns `row`, `url` and `caption`.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from microvlm.atomic import new_file, os_errors_about
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import quote

RELEASE_URL = "https://storage.googleapis.com/conceptual_12m/cc12m.tsv"
RELEASE_ROWS, RELEASE_BYTES = 12_423_374, 2_707_204_412
"""Rows and bytes of the release, as published."""
TABLE = "cc12m.tsv"
MAX_LINE_BYTES = 65_536
MAX_CAPTION = 4000
_TIMEOUT_S = 30
_PIECE_BYTES = 1 << 20


class UrlTable:
    """A table of URLs and captions: a user's file, or the release, fetched as far as it is read."""

    def __init__(self, path: Path, release_url: str | None = None):
        """`path` is the table. With `release_url` it may be missing or end early, and grows when more is read."""
        self.path, self.release_url = path, release_url
        self.skipped = 0
        """Lines of the last `rows` that are no row: without a tab or an http address, too long, or not UTF-8."""
        self.lines = 0

    def rows(self, most: int | None = None) -> Iterator[tuple[int, str, str]]:
        """(number of the line, URL, caption) of the first `most` lines, in order. Raises UserError."""
        self.skipped = self.lines = 0
        for number, line in enumerate(islice(self._read_lines(), most)):
            self.lines = number + 1
            row = _parse(line)
            if row is None:
                self.skipped += 1
            else:
                yield number, *row
        if self.lines and self.skipped == self.lines:
            raise UserError(
                f"{self.path} has no line of a URL, a tab and a caption (its first is {quote(_first_line(self.path))}):"
                " give --metadata the cc12m.tsv of the CC12M release."
            )

    def _read_lines(self) -> Iterator[bytes]:
        """Whole lines, the last one also without a line's end; fetches more of the release at the end of the file."""
        if self.release_url is not None and not self.path.exists():
            with os_errors_about(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()
        try:
            with documents.open_regular(self.path) as file:
                while True:
                    start = file.tell()
                    line = file.readline(MAX_LINE_BYTES)
                    if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES and self._fetch_more():
                        file.seek(start)
                        continue
                    if not line:
                        return
                    if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                        while (
                            len(rest := file.readline(MAX_LINE_BYTES)) == MAX_LINE_BYTES
                            and rest[-1:] != b"\n"
                        ):
                            pass
                    yield line
        except FileNotFoundError:
            raise UserError(
                f"{self.path} does not exist: give --metadata the cc12m.tsv of the release."
            ) from None

    def _fetch_more(self) -> bool:
        """Append the next piece of the release to the file; False at its end."""
        if self.release_url is None:
            return False
        size = self.path.stat().st_size
        request = urllib.request.Request(self.release_url, headers={"Range": f"bytes={size}-"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer, self.path.open("ab") as file:
                if size and answer.status != 206:
                    raise UserError(
                        f"the server does not send {TABLE} in parts: delete {self.path}, and try again."
                    )
                note(f"fetching {TABLE} from byte {size:,} on")
                # A connection a gigabyte, not one a piece: the rest is read while lines are used.
                for _ in range(64):
                    if not (piece := answer.read(_PIECE_BYTES)):
                        break
                    file.write(piece)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing behind the last byte
                return False
            raise UserError(f"{self.release_url} answers {error.code}: {_by_hand()}.") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"{self.release_url} cannot be reached ({reason}): {_by_hand()}.") from None
        return self.path.stat().st_size > size


def write_list(rows: Iterator[tuple[int, str, str]], path: Path) -> int:
    """Write rows to a Parquet file for img2dataset -> how many. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"row": pa.int64(), "url": pa.string(), "caption": pa.string()})
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while block := list(islice(rows, 50_000)):
            columns = dict(zip(schema.names, map(list, zip(*block, strict=True)), strict=True))
            writer.write_table(pa.table(columns, schema=schema))
            count += len(block)
    return count


def _parse(line: bytes) -> tuple[str, str] | None:
    """URL and caption of a line; None for one that is no row."""
    if len(line) >= MAX_LINE_BYTES:
        return None
    try:
        url, tab, caption = line.decode().rstrip("\r\n").partition("\t")
    except UnicodeDecodeError:
        return None
    is_web = url.startswith(("http://", "https://")) and not any(letter.isspace() for letter in url)
    caption = caption.strip()
    return (url, caption[:MAX_CAPTION]) if tab and is_web and caption else None


def _first_line(path: Path) -> str:
    with documents.open_regular(path) as file:
        return file.readline(100).decode(errors="replace").strip()


def _by_hand() -> str:
    return (
        f"run the same command again, or get {TABLE} of the CC12M release by hand and give it with --metadata"
    )
