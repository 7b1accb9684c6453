"""Runs img2dataset with limits that it lacks: on the bytes and the whole time of an answer, and on what is a picture.

A program of its own: `PYTHON img2dataset_run.py RUN.json [--with-parent]`. It imports the standard library and
img2dataset alone, so that PYTHON may be that of an environment without MicroVLM, and so that PySpark can send it to
other machines. With `--with-parent` it ends when its standard input closes, so that it never outlives the command.

img2dataset opens URLs by urllib. Each of its processes installs an opener whose answers are read in pieces and refused,
with a reason that becomes the picture's `error_message`, before they are too large, too slow, cut short or a web page.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
import types
import urllib.request
from http.client import HTTPResponse
from typing import Any

TOO_LARGE = "too many bytes"
TOO_SLOW = "timed out"
CUT_SHORT = "cut short"
WEB_PAGE = "a web page, no picture"
BYTES_SUFFIX = ".bytes"
"""Of the file beside a shard that says how many bytes were read for it."""
_PIECE_BYTES = 1 << 16
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN, _END_OF_JPEG, _END_OF_PNG = b"\xff\xda", b"\xff\xd9", b"IEND"

if __name__ in ("__main__", "__mp_main__"):
    # img2dataset imports both and needs neither here: seconds and 300 MB for every process that it starts.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))


class LimitedAnswer:
    """An HTTP answer whose `read` raises ValueError for one that is too large, too slow, cut short or a web page."""

    def __init__(self, response: HTTPResponse, limits: Limits):
        self.response, self.limits = response, limits
        self.headers = response.headers

    def __enter__(self) -> LimitedAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.response, name)

    def read(self) -> bytes:
        """The whole body. At most `most_bytes` and one piece are read, for at most twice the time-out."""
        pieces: list[bytes] = []
        size = 0
        deadline = time.monotonic() + self.limits.timeout_s
        try:
            while piece := self.response.read1(_PIECE_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > self.limits.most_bytes:
                    raise ValueError(TOO_LARGE)
                if time.monotonic() > deadline:
                    raise ValueError(TOO_SLOW)
        finally:
            self.limits.sizes.append(size)
        content = b"".join(pieces)
        if self.response.length:  # of the announced bytes, those that did not come
            raise ValueError(CUT_SHORT)
        _refuse_other_content(content)
        return content


class Limits(urllib.request.BaseHandler):
    """A handler of urllib that puts `LimitedAnswer` around every answer that is no error."""

    handler_order = 2000  # behind the handler that turns errors and redirections away

    def __init__(self, most_bytes: int, timeout_s: float):
        self.most_bytes, self.timeout_s = most_bytes, timeout_s
        self.sizes: list[int] = []
        """Bytes that were read of each answer, by many threads."""

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        if isinstance(response, LimitedAnswer):  # of a redirection, which was limited already
            return response
        announced = response.headers.get("Content-Length", "")
        if announced.isdigit() and int(announced) > self.most_bytes:
            response.close()
            raise ValueError(TOO_LARGE)
        return LimitedAnswer(response, self)

    https_response = http_response


class LimitedDownloader:
    """img2dataset's Downloader of a shard, in a process with `Limits` that dies with its parent."""

    def __init__(self, *arguments: Any, most_bytes: int, **options: Any):
        from img2dataset.downloader import Downloader

        self.most_bytes, self.timeout_s = most_bytes, options["timeout"]
        self.downloader = Downloader(*arguments, **options)

    def __call__(self, row: tuple[int, str]) -> Any:
        _die_with_parent()
        limits = Limits(self.most_bytes, self.timeout_s)
        urllib.request.install_opener(urllib.request.build_opener(limits))
        result = self.downloader(row)
        name = f"{row[0]:0{self.downloader.oom_shard_count}d}{BYTES_SUFFIX}"
        with open(os.path.join(self.downloader.output_folder, name), "w", encoding="ascii") as file:
            file.write(str(sum(limits.sizes)))
        return result


def run(document: dict[str, Any]) -> None:
    """Run img2dataset's `download` with `options`; with `spark_master`, in a Spark session of that cluster."""
    # The package has a function of the module's name.
    program: Any = importlib.import_module("img2dataset.main")
    program.Downloader = functools.partial(LimitedDownloader, most_bytes=document["most_bytes"])
    if document.get("spark_master"):
        _start_spark(document["spark_master"])
    program.download(**document["options"])


def _start_spark(master: str) -> None:
    """Start the session that img2dataset's distributor then finds.

    The other machines use the Python at the same path, unless PYSPARK_PYTHON says another.
    """
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("microvlm-data cc12m").master(master)
    builder.config("spark.task.maxFailures", "4").getOrCreate()


def _refuse_other_content(content: bytes) -> None:
    """Raise ValueError for a web page, and for a JPEG or PNG without its end, which OpenCV would fill with grey."""
    start = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--", b"<script")):
        raise ValueError(WEB_PAGE)
    if content.startswith(_JPEG) and content.rfind(_END_OF_JPEG) < content.rfind(_START_OF_SCAN):
        raise ValueError(CUT_SHORT)
    if content.startswith(_PNG) and _END_OF_PNG not in content[-64:]:
        raise ValueError(CUT_SHORT)


def _die_with_parent() -> None:
    """Let this process end when the one that started it does. Spark looks after its own."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    name = "watch of the parent"
    if parent is not None and all(thread.name != name for thread in threading.enumerate()):
        target = lambda: (wait([parent.sentinel]), os._exit(1))  # noqa: E731
        threading.Thread(target=target, name=name, daemon=True).start()


def _die_with_input() -> None:
    """Wait for the end of standard input, then end this process and what it started."""
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[2:] == ["--with-parent"]:
        threading.Thread(target=_die_with_input, daemon=True).start()
    with open(sys.argv[1], encoding="utf-8") as _file:
        run(json.load(_file))
