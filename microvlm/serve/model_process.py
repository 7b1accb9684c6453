"""The worker as the server sees it: one job at a time, and a new process in place of one that died or was too slow."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress

from microvlm.serve.limits import Limits
from microvlm.serve.messages import LENGTH, LONGEST_FRAME, Event, Job, ModelSpec, pack, unpack
from microvlm.serve.refusal import Refusal, busy

_LOAD_S = 600
"""Longest time of loading a model; a checkpoint may have to be exported first."""
_PROGRAM = "from microvlm.serve.worker.process import main; main()"

MakeJob = Callable[[bool], Job]
"""Makes the job once it is its turn; True: with the memory's rows."""


class Died(Exception):
    """The worker ended. `has_begun`: it had taken the job."""

    def __init__(self, has_begun: bool):
        super().__init__("the worker ended")
        self.has_begun = has_begun


class Exchange:
    """A job on its way: an iterator over its events, the last of which is `done`. Raises Refusal."""

    def __init__(self) -> None:
        self.is_abandoned = False
        self.when_over: Callable[[], None] = _nothing
        """Called once the job has left the queue, however it ended."""
        self.events: asyncio.Queue[Event | Refusal] = asyncio.Queue()
        self._is_over = False

    def __aiter__(self) -> Exchange:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        event = await self.events.get()
        if isinstance(event, Refusal):
            self._is_over = True
            raise event
        self._is_over = event.is_last
        return event

    def abandon(self) -> None:
        """Nobody waits for it any more: it is not begun, if it has not been."""
        self.is_abandoned = True


def _nothing() -> None:
    return


class ModelProcess:
    """Starts the worker when it is needed. Used from one event loop."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._tasks: set[asyncio.Task] = set()
        self._loaded: set[ModelSpec] = set()
        """What the present worker has loaded."""
        self.waiting = 0
        """Jobs that are waiting or running."""

    def submit(
        self, make_job: MakeJob, on_done: Callable[[Event], Event], request_s: float | None
    ) -> Exchange:
        """Queue a job -> its events. `on_done` gets the last event before any other job begins, also where nobody waits
        for it. Raises Refusal for a full queue."""
        if self.waiting > self._limits.waiting:
            raise busy(
                "queue_full",
                f"{self.waiting} requests wait for the model, as many as may: try again in a moment.",
            )
        exchange = Exchange()
        self.waiting += 1
        self._begin(self._run(exchange, make_job, on_done, request_s))
        return exchange

    async def close(self) -> None:
        """End the worker."""
        for task in list(self._tasks):
            task.cancel()
        await self._end()

    async def _run(
        self,
        exchange: Exchange,
        make_job: MakeJob,
        on_done: Callable[[Event], Event],
        request_s: float | None,
    ) -> None:
        is_held = False
        try:
            async with asyncio.timeout(request_s):
                await self._lock.acquire()
                is_held = True
            if exchange.is_abandoned:
                raise Refusal(400, "cut_off", "the client left before its turn came.")
            await self._load(make_job(False).model)
            # A model that has to be loaded again is not the request's fault.
            async with asyncio.timeout(request_s):
                await self._converse_safely(exchange, make_job, on_done)
        except TimeoutError:
            exchange.events.put_nowait(await self._stop_late(is_held))
        except Died:
            await self._end()
            sentence = "the process that runs the model ended and is started again: ask once more."
            exchange.events.put_nowait(Refusal(500, "worker_died", sentence))
        except Refusal as refusal:
            exchange.events.put_nowait(refusal)
        except BaseException:
            await self._end()
            sentence = "the server met a defect in its program; ask once more."
            exchange.events.put_nowait(Refusal(500, "defect", sentence))
            raise
        finally:
            self.waiting -= 1
            exchange.when_over()
            if is_held:
                self._lock.release()
        if self._process is None:
            # The next request need not wait for it.
            self._begin(self._start_again())

    async def _stop_late(self, is_held: bool) -> Refusal:
        """End a worker that takes too long -> what to say; a job that only waited leaves it alone."""
        seconds = f"{self._limits.request_s:g} seconds"
        if not is_held:
            return busy("queue_slow", f"the model was busy with others for {seconds}: try again.")
        await self._end()
        return Refusal(
            504,
            "too_slow",
            f"the answer took longer than {seconds} and was stopped: ask for a shorter one, or raise "
            "--request-seconds.",
        )

    async def _load(self, model: ModelSpec) -> None:
        """Have the worker load a model that it has not loaded yet. Raises Refusal, and Died."""
        if model in self._loaded and self._process is not None and self._process.returncode is None:
            return
        try:
            async with asyncio.timeout(_LOAD_S):
                event = await self._send(None, Job("load", model))
        except TimeoutError:
            raise Died(True) from None
        if event.kind != "done":
            raise Refusal(event.status or 500, event.code or "defect", event.text)
        self._loaded.add(model)

    async def _converse_safely(
        self, exchange: Exchange, make_job: MakeJob, on_done: Callable[[Event], Event]
    ) -> None:
        """Converse, once more where the worker had ended before it took the job: then it did not end because of it."""
        try:
            await self._converse(exchange, make_job, on_done)
        except Died as death:
            if death.has_begun:
                raise
            await self._end()
            await self._load(make_job(False).model)
            await self._converse(exchange, make_job, on_done)

    async def _converse(
        self, exchange: Exchange, make_job: MakeJob, on_done: Callable[[Event], Event]
    ) -> None:
        event = await self._send(exchange, make_job(False))
        if event.kind == "missing":
            event = await self._send(exchange, make_job(True))
        if event.kind == "done":
            exchange.events.put_nowait(on_done(event))
        else:
            raise Refusal(event.status or 500, event.code or "defect", event.text or "the answer is lost.")

    async def _send(self, exchange: Exchange | None, job: Job) -> Event:
        """Send a job -> its last event; the others go to the exchange. Raises Died."""
        process = await self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        has_begun = False
        try:
            process.stdin.write(pack(job))
            await process.stdin.drain()
            while True:
                (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
                if length > LONGEST_FRAME:
                    raise ValueError("a frame of the worker is too long")
                event: Event = unpack(await process.stdout.readexactly(length), Event)
                has_begun = True
                if event.is_last:
                    return event
                if exchange is not None and event.kind != "begun":
                    exchange.events.put_nowait(event)
        except (EOFError, OSError, ValueError):
            raise Died(has_begun) from None

    async def _started(self) -> Process:
        if self._process is not None and self._process.returncode is not None:
            await self._end()
        if self._process is None:
            # A program that changed its path has a worker that finds the same modules.
            path = os.pathsep.join(entry for entry in sys.path if entry)
            command = (sys.executable, "-P", "-c", _PROGRAM)
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, env={**os.environ, "PYTHONPATH": path}
            )
        return self._process

    async def _start_again(self) -> None:
        async with self._lock:
            with suppress(OSError):
                await self._started()

    async def _end(self) -> None:
        process, self._process = self._process, None
        self._loaded.clear()
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    def _begin(self, work: object) -> None:
        task: asyncio.Task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
