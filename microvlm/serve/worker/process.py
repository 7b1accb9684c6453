"""The process that runs the models: jobs come on stdin, events go to what was stdout. Knows no HTTP.

One job at a time. It keeps the memories that it was last asked about; the server keeps their rows, so that nothing is
lost when this process dies. What a model prints goes to stderr.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

from microvlm.errors import UserError
from microvlm.serve.messages import LENGTH, LONGEST_FRAME, Event, Job, ModelSpec, NewRow, pack, unpack

if TYPE_CHECKING:
    from microvlm.loaded_model import LoadedModel
    from microvlm.memory.episodic import Entry, EpisodicMemory

MOST_MEMORIES = 64
"""Memories that are held; of others the server sends the rows again."""

Emit = Callable[[Event], None]


class Missing(Exception):
    """The memory of a job is not held here in its revision."""


def main() -> None:
    """Answer jobs until stdin ends."""
    # Ctrl-C reaches every process of a terminal; the server ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs, events = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    worker = Worker()
    while (job := _read(jobs)) is not None:
        worker.run(job, lambda event: _write(events, event))


def _read(stream: BinaryIO) -> Job | None:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    if length > LONGEST_FRAME:
        return None
    content = stream.read(length)
    job: Job | None = unpack(content, Job) if len(content) == length else None
    return job


def _write(stream: BinaryIO, event: Event) -> None:
    stream.write(pack(event))
    stream.flush()


class Worker:
    """Loaded models, and the memories that were last used."""

    def __init__(self) -> None:
        self._models: dict[ModelSpec, LoadedModel] = {}
        self._memories: OrderedDict[str, tuple[int, EpisodicMemory]] = OrderedDict()

    def run(self, job: Job, emit: Emit) -> None:
        """Do a job and emit its events, the last of which says how it ended."""
        from microvlm.inputs.images import TooLargePicture

        try:
            emit(Event("begun"))
            emit(self._do(job, emit))
        except Missing:
            emit(Event("missing"))
        except TooLargePicture as error:
            emit(Event("refused", str(error), 413, "picture_too_large"))
        except UserError as error:
            emit(Event("refused", str(error), 400, "bad_request"))
        except MemoryError:
            sentence = "there is not enough memory for this: give a smaller picture, or ask again later."
            emit(Event("refused", sentence, 503, "out_of_memory"))
        except BrokenPipeError:
            raise SystemExit(0) from None  # the server is gone
        except Exception:
            # The one request fails, its traceback is in the server's log, and the models stay loaded for the others.
            traceback.print_exc()
            self._memories.pop(job.memory, None)
            sentence = "the server met a defect in its program, which its log describes; nothing was changed."
            emit(Event("defect", sentence, 500, "defect"))

    def _do(self, job: Job, emit: Emit) -> Event:
        from microvlm.serve.worker import tasks

        loaded = self._load(job.model)
        if job.kind == "load":
            return Event("done", value=tasks.describe(loaded, job.model))
        memory = self._memory(job, loaded)
        before = list(memory.entries)
        value = tasks.TASKS[job.kind](loaded, memory, job, emit)
        if job.kind == "ask":
            tasks.forget_oldest_turns(loaded, memory, job.turns)
        event = _changes(before, memory.entries, value)
        if job.memory:
            is_changed = bool(event.removed or event.added)
            self._memories[job.memory] = (job.revision + is_changed, memory)
            while len(self._memories) > MOST_MEMORIES:
                self._memories.popitem(last=False)
        return event

    def _load(self, spec: ModelSpec) -> LoadedModel:
        from microvlm.loaded_model import load

        if spec not in self._models:
            self._models[spec] = load(spec.source, spec.backend, spec.threads)
        return self._models[spec]

    def _memory(self, job: Job, loaded: LoadedModel) -> EpisodicMemory:
        """The memory of a job. It is held again once the job is done: a job that fails may have changed half of it."""
        from microvlm.serve.worker.stored_rows import memory_of

        revision, memory = self._memories.pop(job.memory, (-1, None))
        if memory is not None and revision == job.revision:
            return memory
        if job.rows is None and job.revision:
            raise Missing
        return memory_of(loaded.runtime, job.rows or [])


def _changes(before: list[Entry], after: list[Entry], value: dict[str, Any]) -> Event:
    from microvlm.serve.worker.stored_rows import encode_row, view_of

    old, new = {id(entry) for entry in before}, {id(entry) for entry in after}
    removed = [index for index, entry in enumerate(before) if id(entry) not in new]
    added = [NewRow(encode_row(entry), view_of(entry)) for entry in after if id(entry) not in old]
    return Event("done", value=value, removed=removed, added=added)


if __name__ == "__main__":
    main()
