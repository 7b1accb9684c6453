"""Looks at records in worker processes and hands them on in their order, with a bounded number on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from microvlm.errors import UserError
from microvlm.training.data.images.pictures import CheckedRecord, PictureLimits, check_records
from microvlm.training.data.images.source_record import SourceRecord

BATCH = 16
_FIRST_BATCHES = 4
"""Batches that this process looks at itself: a small set is done before a worker has started."""
_BATCHES_AHEAD = 3
"""Batches on the way for each worker."""


def check_stream(
    records: Iterator[SourceRecord], limits: PictureLimits, workers: int
) -> Iterator[CheckedRecord]:
    """Look at all records, in order. `workers`: processes; 0: this one alone. Raises UserError when one is killed."""
    for batch in islice(_batches(records), None if not workers else _FIRST_BATCHES):
        yield from check_records(batch, limits)
    if not workers:
        return
    first = next(_batches(records), None)
    if first is None:
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    try:
        waiting: deque[Future[list[CheckedRecord]]] = deque([pool.submit(check_records, first, limits)])
        for batch in _batches(records):
            waiting.append(pool.submit(check_records, batch, limits))
            if len(waiting) > workers * _BATCHES_AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process that looks at pictures was killed, as when memory runs out; run the same command with fewer "
            "--workers, which goes on where it was."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(records: Iterator[SourceRecord]) -> Iterator[list[SourceRecord]]:
    while batch := list(islice(records, BATCH)):
        yield batch


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent process, and end when that one has ended however it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
