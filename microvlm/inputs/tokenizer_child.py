"""A tokenizer of the `tokenizers` library in a process of its own, with a limit on time and memory.

The splitting patterns of a tokenizer.json are regular expressions for a matcher that can take exponential time, its
replacements can multiply a text, and its odder options can stop the library itself. Whatever is not on the list of
`tokenizer_steps` therefore runs here: a call that takes too much ends the process and is one sentence, and the next
call starts another process.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from microvlm.errors import UserError
from microvlm.inputs.tokenizer_process import Reply, TokenizerProcess
from microvlm.inputs.tokenizer_tables import TOKENIZER

LOAD_S = 30
"""The most seconds that a process may take to load its file: one of 10 MB takes 5 s on a Raspberry Pi Zero 2 W."""
CALL_S = 5
"""The most seconds of one text."""
MEMORY_BYTES = 10**9
"""The most address space of a process; one with Qwen's 151,643 tokens takes an eighth."""


class ChildTokenizer:
    """A `TextTokenizer` whose work is done in another process. May be used from several threads and after a fork."""

    def __init__(self, document: bytes, origin: Path, remark: str):
        """`document`: the bytes of tokenizer.json. `remark`: why it runs in a process of its own. Raises UserError."""
        self._document, self._origin, self._remark = document, origin, remark
        self._lock = threading.Lock()
        """Held while a process is started, used or ended. Only a fork makes another one."""
        self._process: TokenizerProcess | None = None
        _instances.add(self)
        with self._lock:
            self._running_process()

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
        """End the process, after the call of another thread. A later call starts another one."""
        with self._lock:
            self._end()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._end()

    def __getstate__(self) -> dict[str, Any]:
        return {"document": self._document, "origin": self._origin, "remark": self._remark}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def forget(self) -> None:
        """After a fork: leave the process to the program that started it."""
        self._lock = threading.Lock()  # another thread may have held the old one
        process, self._process = self._process, None
        if process is not None:
            process.forget()

    def _running_process(self) -> TokenizerProcess:
        """The process, started and loaded where there is none or it has ended. The lock must be held."""
        if self._process is not None and self._process.is_running:
            return self._process
        self._end()
        try:
            self._process = process = TokenizerProcess(MEMORY_BYTES)
        except OSError:
            raise UserError(
                f"{self._origin} needs a process of its own ({self._remark}), and the system starts none; "
                "end other programs or take another model."
            ) from None
        reply = self._exchange(process, {"bytes": len(self._document)}, LOAD_S, self._document)
        if reply is None:
            raise UserError(
                f"{self._origin} cannot be loaded within {LOAD_S} s and {_gigabytes()} GB; take another model."
            )
        if reply.failure:
            self._end()
            raise UserError(f"{self._origin} is damaged: copy the checkpoint or bundle again.")
        self.vocab_size, self.added_tokens = reply.vocab_size, reply.added_tokens
        return process

    def _ask(self, request: dict[str, Any]) -> Reply:
        """Raises UserError for a text that the library refuses, or that takes too much."""
        with self._lock:
            reply = self._exchange(self._running_process(), request, CALL_S)
        if reply is None:
            raise UserError(
                f"{self._origin}: the tokenizer took more than {CALL_S} s or {_gigabytes()} GB on this text; "
                "shorten the text or take another model."
            )
        if reply.failure:
            raise UserError(f"{self._origin}: the tokenizers library fails on this text; take another model.")
        return reply

    def _exchange(
        self, process: TokenizerProcess, request: dict[str, Any], seconds: int, content: bytes = b""
    ) -> Reply | None:
        """One request -> its reply. A process without a reply, or whose reply an interrupt left unread, is ended."""
        reply = None
        try:
            reply = process.exchange(request, seconds, content)
        finally:
            if reply is None:
                self._end()
        return reply

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


def _gigabytes() -> int:
    return MEMORY_BYTES // 10**9


_instances: weakref.WeakSet[ChildTokenizer] = weakref.WeakSet()


def _forget_processes() -> None:
    for tokenizer in list(_instances):
        tokenizer.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_processes)
