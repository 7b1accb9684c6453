"""`microvlm-data cc12m`: fetches pictures and captions of Conceptual 12M, as ready shards or from their URLs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from microvlm.console import after_saving, echo, note, print_json
from microvlm.errors import UserError
from microvlm.training.data.download import url_table
from microvlm.training.data.download.as_data import build_data
from microvlm.training.data.download.download_yield import (
    FAILED,
    PUBLISHED_YIELD,
    DownloadYield,
    retryable,
    summarise,
)
from microvlm.training.data.download.hub_files import HubUnreachable
from microvlm.training.data.download.picture_download import DownloadSettings, download, prepare
from microvlm.training.data.download.ready_shards import REPOSITORY, fetch_shards, list_shards
from microvlm.training.data.download.url_lists import (
    DownloadRecord,
    add_retry,
    cover_table,
    finished_shards,
    pending_shards,
    read_record,
    shard_path,
)

LICENCE = (
    "CC12M's URLs and captions may be used for any purpose, with credit to Google LLC as their source; each picture "
    "has its own licence."
)
TEST_ROWS = 100
_SHOWN_ROWS, _SHOWN_CHARACTERS = 3, 100


@dataclass(frozen=True)
class Choices:
    """What the user asked for."""

    mode: str
    output: Path
    most: int
    table: Path | None
    shard_size: int
    retry: bool
    copies: bool
    dry_run: bool
    revision: str | None
    settings: DownloadSettings


@click.command()
@click.option(
    "--mode",
    type=click.Choice(["metadata", "test", "images"]),
    required=True,
    help="Look at the list; try 100 pictures; or fetch up to --max-images.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to fetch into.")
@click.option(
    "--max-images", type=click.IntRange(1), default=10_000, show_default=True, help="Most pictures to try."
)
@click.option(
    "--shards", is_flag=True, help=f"Ready shards, {REPOSITORY} on the hub: whole, faster, of 2021."
)
@click.option("--revision", help="Commit of the ready shards; the newest at first, then the same one.")
@click.option("--metadata", "table", type=click.Path(path_type=Path), help="A cc12m.tsv that you have.")
@click.option("--retry", is_flag=True, help="Fetch only what failed, once more.")
@click.option("--num-workers", type=click.IntRange(1, 1024), default=4, show_default=True, help="Processes.")
@click.option("--threads", type=click.IntRange(1, 1024), default=32, show_default=True, help="Of a process.")
@click.option(
    "--timeout", type=click.IntRange(1, 600), default=10, show_default=True, help="Seconds of one answer."
)
@click.option(
    "--max-bytes", type=click.IntRange(1), default=20_000_000, show_default=True, help="Of one answer."
)
@click.option(
    "--shard-size",
    type=click.Choice(["10", "100", "1000", "10000"]),
    default="1000",
    show_default=True,
    help="Pictures of a shard.",
)
@click.option(
    "--distributor",
    type=click.Choice(["multiprocessing", "pyspark"]),
    default="multiprocessing",
    show_default=True,
    help="What shares the work: processes of this machine, or a Spark cluster.",
)
@click.option("--spark-master", help="Address of the cluster: spark://HOST:7077, yarn, local[2].")
@click.option(
    "--python", default=sys.executable, help="The Python that has img2dataset, if it is another one."
)
@click.option("--no-data", is_flag=True, help="Only fetch the shards, and build no data folder of them.")
@click.option(
    "--dry-run", is_flag=True, help="Write the lists, print the command that fetches them, and end."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def cc12m(
    mode: str,
    output: Path,
    max_images: int,
    shards: bool,
    revision: str | None,
    table: Path | None,
    retry: bool,
    num_workers: int,
    threads: int,
    timeout: int,
    max_bytes: int,
    shard_size: str,
    distributor: str,
    spark_master: str | None,
    python: str,
    no_data: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fetch captioned pictures of Conceptual 12M, whatever was interrupted going on.

    With --shards from a crawl of 2021 that is kept on the Hugging Face hub; without, from the pictures' own URLs, of
    which about two thirds still answer.

    \b
    Example: microvlm-data cc12m --mode test -o cc12m
    """
    if (spark_master is not None) != (distributor == "pyspark"):
        raise UserError("--distributor pyspark and --spark-master belong together: give both, or neither.")
    url_options = (table is not None, retry, dry_run, spark_master is not None)
    if shards and any(url_options):
        raise UserError(
            "--shards fetches no URLs: leave out --metadata, --retry, --dry-run and --distributor."
        )
    settings = DownloadSettings(num_workers, threads, timeout, max_bytes, python, spark_master)
    most = min(max_images, TEST_ROWS) if mode == "test" else max_images
    choices = Choices(
        mode, output, most, table, int(shard_size), retry, not no_data, dry_run, revision, settings
    )
    with _only_writer(output):
        document, lines = _fetch_ready(choices) if shards else _fetch_urls(choices)
    with after_saving():
        if as_json:
            print_json(document)
        for line in () if as_json else [LICENCE, *lines]:
            echo(line)


def _fetch_ready(choices: Choices) -> tuple[dict[str, Any], list[str]]:
    try:
        listing = list_shards(choices.output, choices.revision)
        nbytes = sum(file.nbytes for file in listing.files)
        document: dict[str, Any] = {
            "repository": REPOSITORY,
            "revision": listing.commit,
            "shards": len(listing.files),
            "bytes": nbytes,
        }
        lines = [f"{REPOSITORY} at {listing.commit}: {len(listing.files):,} shards, {nbytes:,} bytes"]
        if choices.mode == "metadata":
            return document, lines
        fetched = fetch_shards(choices.output, listing, choices.most)
    except HubUnreachable as error:
        raise UserError(
            f"{error}: run the same command again, which goes on, or leave out --shards."
        ) from None
    document |= {
        "fetched_shards": len(fetched.paths),
        "fetched_bytes": fetched.nbytes,
        "pictures": fetched.pictures,
    }
    lines.append(
        f"{len(fetched.paths)} shards fetched: {fetched.pictures:,} pictures, {fetched.nbytes:,} bytes"
    )
    if choices.copies:
        document["data"], more = build_data(choices.output, list(fetched.paths), choices.most)
        lines += more
    return document, lines


def _fetch_urls(choices: Choices) -> tuple[dict[str, Any], list[str]]:
    table = _table(choices)
    if choices.mode == "metadata":
        return _look_at_table(table)
    if choices.retry:
        record = _plan_retry(choices)
    else:
        record = cover_table(choices.output, table, choices.most, choices.shard_size)
    if choices.dry_run:
        command = prepare(choices.output, record, choices.settings)
        return {"command": command}, [shlex.join(command)]
    download(choices.output, record, choices.settings)
    result = summarise(choices.output, record)
    document, lines = result.document(), _describe(result, choices.output)
    if choices.copies and result.kept:
        shards = [shard_path(choices.output, number) for number in sorted(finished_shards(choices.output))]
        document["data"], more = build_data(choices.output, shards)
        lines += more
    return document, lines


def _table(choices: Choices) -> url_table.UrlTable:
    """The user's table, or the release beside the pictures. The environment may name another address of it."""
    if choices.table is not None:
        return url_table.UrlTable(choices.table)
    release = os.environ.get("MICROVLM_CC12M_URL", url_table.RELEASE_URL)
    if choices.mode != "metadata":
        note(f"ready shards come faster and whole: --shards takes {REPOSITORY} from the hub")
    return url_table.UrlTable(choices.output / url_table.TABLE, release)


def _look_at_table(table: url_table.UrlTable) -> tuple[dict[str, Any], list[str]]:
    shown, count = [], 0
    for _, url, caption in table.rows():
        if count < _SHOWN_ROWS:
            shown.append({"url": url, "caption": caption})
        count += 1
    if not count:
        raise UserError(f"{table.path} is empty: give --metadata the cc12m.tsv of the CC12M release.")
    document = {"table": str(table.path), "rows": count, "skipped_lines": table.skipped, "first": shown}
    lines = [
        f"{table.path}: {count:,} rows (the release has {url_table.RELEASE_ROWS:,}), "
        f"{table.skipped:,} other lines left out"
    ]
    for row in shown:
        lines += [f"  {row['url'][:_SHOWN_CHARACTERS]}", f"    {row['caption'][:_SHOWN_CHARACTERS]}"]
    return document, lines


def _plan_retry(choices: Choices) -> DownloadRecord:
    """The record with the failures as a new list; one that is unfinished is gone on with first."""
    record = read_record(choices.output)
    if record is None:
        raise UserError(f"{choices.output} has nothing to try again: fetch pictures first, without --retry.")
    if pending_shards(choices.output, record):
        note("what was interrupted is finished first; --retry again tries the failures.")
        return record
    return add_retry(choices.output, record, retryable(choices.output, record))


def _describe(result: DownloadYield, output: Path) -> list[str]:
    low, high = (round(100 * share) for share in PUBLISHED_YIELD)
    lines = [
        f"{result.kept:,} of {result.tried:,} pictures kept ({100 * result.share:.1f} %); published for 2025-26, not "
        f"measured here: {low}-{high} %",
        f"{result.read_bytes:,} bytes read, {result.kept_bytes:,} bytes kept in {output}",
        *(f"  {count:9,}  {reason}" for reason, count in result.reasons.items()),
    ]
    if result.reasons:
        lines.append(f"failures are in {output / FAILED}; --retry fetches only those again")
    return lines


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Refuse to work in a folder in which another command works."""
    from filelock import FileLock, Timeout

    from microvlm.atomic import os_errors_about

    with os_errors_about(output):
        output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another command fetches into {output}: wait for its end, or give another -o."
        ) from None
    try:
        yield
    finally:
        lock.release()
