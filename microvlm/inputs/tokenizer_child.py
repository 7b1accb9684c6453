"""A tokenizer of the `tokenizers` library in a process of its own, with a limit on time and memory.

The splitting patterns of a tokenizer.json are regular expressions for a matcher that can take exponential time, and its
odder options can stop the library itself. A file with other patterns than the known ones therefore runs here: a call
that takes too long ends the child and is one sentence, and the next call starts another child.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.inputs.tokenizer_tables import TOKENIZER

LOAD_S = 120
"""The most seconds that a child may take to load its file: one of 10 MB takes 5 s on a Raspberry Pi Zero 2 W."""
CALL_S = 20
"""The most seconds of one text."""
MEMORY_BYTES = 2**31
"""The most address space of a child; the library takes a few hundred MB for 250,000 tokens."""
_PROGRAM = "from microvlm.inputs.tokenizer_child import serve; serve()"


class _Reply(Struct, frozen=True):
    """What the child answers. `failure`: the library refused the file or the text."""

    failure: bool = False
    ids: list[int] = []
    text: str = ""
    number: int | None = None
    vocab_size: int = 0
    added_tokens: dict[str, int] = {}


class ChildTokenizer:
    """A `TextTokenizer` whose work is done in a child. May be used from several threads and after a fork."""

    def __init__(self, document: bytes, origin: Path, remark: str):
        """`document`: the bytes of tokenizer.json. `remark`: why it runs in a child. Raises UserError."""
        self._document, self._origin, self._remark = document, origin, remark
        self._start()

    @property
    def description(self) -> str:
        return f"the tokenizers library in a process of its own ({self._remark})"

    @property
    def identity(self) -> str:
        return hashlib.sha256(self._document).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._ask({"encode": text}).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._ask({"decode": [int(number) for number in ids]}).text

    def token_to_id(self, token: str) -> int | None:
        return self._ask({"number": token}).number

    def save(self, directory: Path) -> None:
        (directory / TOKENIZER).write_bytes(self._document)

    def close(self) -> None:
        """End the child. A later call starts another one."""
        if self._owner != os.getpid():
            return
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent yet has no reader
                stream and stream.close()
        self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"document": self._document, "origin": self._origin, "remark": self._remark}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _start(self) -> None:
        self._lock, self._owner = threading.Lock(), os.getpid()
        # A child of a program that changed its path finds the same modules.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        reply = self._exchange({"bytes": len(self._document)}, LOAD_S, self._document)
        if reply is None or reply.failure:
            self.close()
            raise UserError(f"{self._origin} is damaged: copy the checkpoint or bundle again.")
        self.vocab_size, self.added_tokens = reply.vocab_size, reply.added_tokens

    def _ask(self, request: dict[str, Any]) -> _Reply:
        """Raises UserError for a text that the library refuses, or that takes too long."""
        if self._owner != os.getpid() or self._process.poll() is not None:
            self._start()
        with self._lock:
            reply = self._exchange(request, CALL_S)
        if reply is None:
            self.close()
            raise UserError(
                f"{self._origin}: its patterns took more than {CALL_S} s, or more memory than allowed, on this text; "
                "shorten the text or take another model."
            )
        if reply.failure:
            raise UserError(f"{self._origin}: the tokenizers library fails on this text; take another model.")
        return reply

    def _exchange(self, request: dict[str, Any], limit_s: int, content: bytes = b"") -> _Reply | None:
        """Send one request -> the reply; None when the child ended or was stopped."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(limit_s, self._process.kill)
        timer.start()
        try:
            line = json.dumps({**request, "seconds": limit_s}).encode() + b"\n"
            self._process.stdin.write(line + content)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            return documents.parse(answer, _Reply, "the tokenizer's process", "try again") if answer else None
        except OSError:  # the child has ended
            return None
        finally:
            timer.cancel()


def serve() -> None:
    """The child's program: load the file that the first request announces, then answer requests until their end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    _limit_memory()
    from tokenizers import Tokenizer

    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    tokenizer: Any = None
    for line in iter(requests.readline, b""):
        request = json.loads(line)
        # The child of a parent that was killed ends too.
        if hasattr(signal, "alarm"):
            signal.alarm(request["seconds"] + 1)
        try:
            if tokenizer is None:
                tokenizer = Tokenizer.from_str(requests.read(request["bytes"]).decode())
            reply = _answer(tokenizer, request)
        except BaseException:  # the library raises plain Exception, and panics of Rust as BaseException
            reply = {"failure": True}
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _answer(tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    if "bytes" in request:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        decoder = tokenizer.get_added_tokens_decoder()
        added = {token.content: number for number, token in decoder.items()}
        return {"vocab_size": tokenizer.get_vocab_size(), "added_tokens": added}
    if "encode" in request:
        return {"ids": tokenizer.encode(request["encode"], add_special_tokens=False).ids}
    if "decode" in request:
        return {"text": tokenizer.decode(request["decode"], skip_special_tokens=True)}
    return {"number": tokenizer.token_to_id(request["number"])}


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
