"""Runs img2dataset on the lists of a folder, in processes of its own, and shows how far it is.

img2dataset runs in another process than the command, because it prints, takes over signals and ends processes, and
because it may live in another environment: it holds back the versions of several packages.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microvlm.atomic import os_errors_about, write_file
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.training.data.download import img2dataset_run
from microvlm.training.data.download.url_lists import (
    LISTS,
    SHARDS,
    DownloadRecord,
    finished_shards,
    pending_shards,
    remove_unrecorded,
)

RUN_FILE, LOG = "img2dataset.json", "img2dataset.log"
SHORTER_SIDE = 256
"""Pixels to which larger pictures are shrunk: a crop of 224 with some room to move."""
JPEG_QUALITY = 90
MOST_PIXELS = 100_000_000
"""OpenCV refuses to decode a picture of more, which would take 300 MB."""
USER_AGENT = "microvlm"
_ENVIRONMENT = {
    "OPENCV_IO_MAX_IMAGE_PIXELS": str(MOST_PIXELS),
    "NO_ALBUMENTATIONS_UPDATE": "1",  # it would ask the net for a newer version of itself
}
_POLL_S = 0.2
_REPORT_S = 10.0
_WITH_PARENT = "--with-parent"


@dataclass(frozen=True)
class DownloadSettings:
    """How pictures are fetched; nothing here changes which."""

    workers: int = 4
    """Processes, each working on one shard."""
    threads: int = 32
    """Connections of a process at a time."""
    timeout_s: int = 10
    most_bytes: int = 20_000_000
    """Most bytes of one answer."""
    python: str = sys.executable
    """The Python that has img2dataset."""
    spark_master: str | None = None
    """A Spark cluster's address, whose machines fetch; `workers` is then the cluster's affair."""


def run_document(folder: Path, record: DownloadRecord, settings: DownloadSettings) -> dict[str, Any]:
    """What `img2dataset_run.py` is given: the arguments of img2dataset's `download`, and our limits."""
    folder = folder.resolve()
    options = {
        "url_list": str(folder / LISTS),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": ["row"],
        "output_folder": str(folder / SHARDS),
        "output_format": "webdataset",
        "number_sample_per_shard": record.shard_size,
        "processes_count": settings.workers,
        "thread_count": settings.threads,
        "timeout": settings.timeout_s,
        "retries": 0,
        # Larger pictures are shrunk; others keep their bytes where they are JPEG already.
        "image_size": SHORTER_SIDE,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": JPEG_QUALITY,
        "extract_exif": False,
        "compute_hash": "sha256",
        "incremental_mode": "incremental",
        "enable_wandb": False,
        # Sites that answer with X-Robots-Tag noai, noimageai, noindex or noimageindex are left alone by default.
        "user_agent_token": USER_AGENT,
        "distributor": "pyspark" if settings.spark_master else "multiprocessing",
    }
    return {"most_bytes": settings.most_bytes, "spark_master": settings.spark_master, "options": options}


def prepare(folder: Path, record: DownloadRecord, settings: DownloadSettings) -> list[str]:
    """Write the run's document into the folder -> the command that runs it, which may be given to a cluster."""
    remove_unrecorded(folder, record)
    write_file(folder / RUN_FILE, json.dumps(run_document(folder, record, settings), indent=2) + "\n")
    return [
        settings.python,
        str(Path(img2dataset_run.__file__).resolve()),
        str((folder / RUN_FILE).resolve()),
    ]


def download(folder: Path, record: DownloadRecord, settings: DownloadSettings) -> None:
    """Fetch the pending shards. Raises UserError where img2dataset is missing or left shards unfinished."""
    pending = pending_shards(folder, record)
    if not pending:
        return
    require_img2dataset(settings.python)
    command = prepare(folder, record, settings)
    note(
        f"img2dataset fetches {len(pending)} shards of at most {record.shard_size:,} rows; its log is {folder / LOG}"
    )
    with os_errors_about(folder / LOG), (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [*command, _WITH_PARENT],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,
        )
        try:
            _follow(process, folder, set(pending))
        finally:
            _stop(process)
    left = pending_shards(folder, record)
    if left:
        raise UserError(
            f"img2dataset left {len(left)} of {len(pending)} shards unfinished (see the end of {folder / LOG}): run "
            "the same command again, which goes on there."
        )


def require_img2dataset(python: str) -> None:
    """Raise UserError with what to install where `python` has no img2dataset."""
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('img2dataset') is None)"
    try:
        found = subprocess.run([python, "-c", program], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        raise UserError(f"--python {python} does not start: give the path of a Python.") from None
    if not found:
        raise UserError(
            f"{python} has no img2dataset: pip install 'microvlm[cc12m]', or install it into an environment of its own "
            "and give that with --python (docs/cc12m.md)."
        )


def _follow(process: subprocess.Popen, folder: Path, pending: set[int]) -> None:
    """Wait for the end of img2dataset: a bar on a terminal, elsewhere a line now and then."""
    from tqdm import tqdm

    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    last_report, finished = time.monotonic(), 0
    with tqdm(total=len(pending), unit="shard", file=sys.stderr, disable=not on_terminal) as bar:
        running = True
        while running:
            try:
                process.wait(_POLL_S)
                running = False
            except subprocess.TimeoutExpired:
                pass
            now_finished = len(pending & finished_shards(folder))
            bar.update(now_finished - finished)
            due = time.monotonic() - last_report > _REPORT_S
            if not on_terminal and now_finished > finished and (due or not running):
                note(f"{now_finished} of {len(pending)} shards")
                last_report = time.monotonic()
            finished = now_finished


def _stop(process: subprocess.Popen) -> None:
    """End img2dataset and all its processes, if they are not at their end."""
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()
