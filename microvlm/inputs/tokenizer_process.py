"""One process that runs `tokenizer_server`: a request goes in, its reply comes out, within a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO, Any, cast

from msgspec import Struct

from microvlm.errors import UserError
from microvlm.formats import documents

if sys.platform != "win32":
    import select

_LONGEST_REPLY = 16_000_000
"""The most bytes of a reply: three million ids, which take 120 MB here."""
_PIECE = 1 << 16


class Reply(Struct, frozen=True):
    """What the process answers. `failure`: the library refused the file or the text."""

    request: int
    failure: bool = False
    ids: list[int] = []
    text: str = ""
    number: int | None = None
    vocab_size: int = 0
    added_tokens: dict[str, int] = {}


class TokenizerProcess:
    """A running `tokenizer_server`. One thread at a time may use it."""

    def __init__(self, memory_bytes: int) -> None:
        """Start it. Raises OSError where the system starts no process."""
        # The process of a program that changed its path finds the same modules.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        program = f"from microvlm.inputs.tokenizer_server import serve; serve({memory_bytes})"
        self._requests = 0
        # Without buffers, so that a copy of this object after a fork has nothing to send.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": "1"},
        )
        self._input, self._output = (
            cast(IO[bytes], self._process.stdin),
            cast(IO[bytes], self._process.stdout),
        )
        if os.name == "posix":
            os.set_blocking(self._input.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def exchange(self, request: dict[str, Any], seconds: int, content: bytes = b"") -> Reply | None:
        """Send a request -> its reply; None when the process ended, took too long or answered something else.

        After None, and after an interrupt, a reply may still be on its way: the process must be ended.
        """
        self._requests += 1
        line = json.dumps({**request, "request": self._requests, "seconds": seconds}).encode()
        try:
            send = self._converse if os.name == "posix" else self._converse_blocking
            answer = send(line + b"\n" + content, seconds)
            reply = documents.parse(answer, Reply, "the reply", "try again") if answer else None
        except (OSError, ValueError, UserError):  # the process has ended, or was cut off while it wrote
            return None
        return reply if reply is not None and reply.request == self._requests else None

    def end(self) -> None:
        """Kill it and wait until it is gone."""
        with suppress(OSError):
            self._process.kill()
        self.forget()
        self._process.wait()

    def forget(self) -> None:
        """Close the pipes only: the process belongs to the program that this one was forked from."""
        for stream in (self._input, self._output):
            with suppress(OSError):
                stream.close()

    def _converse(self, message: bytes, seconds: int) -> bytes | None:
        """Send a message and read a line, by a deadline and without a thread for it."""
        deadline = time.monotonic() + seconds
        left, reply = memoryview(message), bytearray()
        poll = select.poll()
        poll.register(self._input.fileno(), select.POLLOUT)
        poll.register(self._output.fileno(), select.POLLIN)
        while (remaining := deadline - time.monotonic()) > 0 and len(reply) <= _LONGEST_REPLY:
            for descriptor, _ in poll.poll(remaining * 1000):
                if descriptor == self._input.fileno():
                    left = left[self._input.write(left[:_PIECE]) or 0 :]
                    if not left:
                        poll.unregister(descriptor)
                    continue
                piece = self._output.read(_PIECE)
                if not piece:
                    return None
                reply += piece
                if piece.endswith(b"\n"):
                    return bytes(reply)
        return None

    def _converse_blocking(self, message: bytes, seconds: int) -> bytes | None:
        """The same on Windows, whose pipes cannot be watched: there the process ends itself in time."""
        left = memoryview(message)
        while left:
            left = left[self._input.write(left[:_PIECE]) or 0 :]
        reply = bytearray()
        while len(reply) <= _LONGEST_REPLY and (piece := self._output.read(_PIECE)):
            reply += piece
            if piece.endswith(b"\n"):
                return bytes(reply)
        return None
