"""The program of `tokenizer_child`'s process: loads one tokenizer.json, then answers requests until their end.

Requests and replies are lines of JSON with the same number in both. Imports neither numpy nor msgspec, whose address
space would count against the limit on memory.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
from typing import Any


def serve(memory_bytes: int) -> None:
    """Answer the requests of standard input on standard output. `memory_bytes`: the most address space."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    _limit_memory(memory_bytes)
    from tokenizers import Tokenizer

    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    tokenizer: Any = None
    for line in iter(requests.readline, b""):
        request = json.loads(line)
        _limit_time(request["seconds"])
        try:
            if tokenizer is None:
                tokenizer = Tokenizer.from_str(requests.read(request["bytes"]).decode())
            reply = _answer(tokenizer, request)
        except BaseException:  # the library raises plain Exception, and panics of Rust as BaseException
            reply = {"failure": True}
        _end_limit()
        replies.write(json.dumps({**reply, "request": request["request"]}).encode() + b"\n")
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


def _limit_time(seconds: int) -> None:
    """End this process after `seconds`, whatever the library does: also where the parent was killed meanwhile."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)
    else:  # Windows, where the parent does not watch the time. The watchdog needs no lock of Python's.
        # It writes before it ends the process; standard error goes nowhere.
        faulthandler.dump_traceback_later(seconds, exit=True)


def _end_limit() -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(0)
    else:
        faulthandler.cancel_dump_traceback_later()


def _limit_memory(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, least in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        limit = least if hard == resource.RLIM_INFINITY else min(hard, least)
        resource.setrlimit(kind, (limit, hard))
