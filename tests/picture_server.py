"""A web of pictures on 127.0.0.1 that answers well, slowly, not at all, in part, too much, or with a page."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

KINDS = ("good", "missing", "slow", "dripping", "truncated", "endless", "huge", "page", "opted-out", "broken")
_LONGEST_S = 6.0
"""After this time every answer ends, whatever it is."""


def picture(number: int, side: int = 300, kind: str = "JPEG") -> bytes:
    """A picture file, one for each number."""
    image = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    image.paste((number * 37 % 256, number * 91 % 256, number * 53 % 256), (0, 0, side // 2, side // 2))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@dataclass
class Web:
    """What the server has done, and whether it was mended."""

    url: str = ""
    asked: Counter = field(default_factory=Counter)
    """Requests by path."""
    sent: Counter = field(default_factory=Counter)
    """Bytes by kind."""
    mended: bool = False
    """Every path answers well."""
    delay_s: float = 0.0
    """Before each good answer."""


@contextmanager
def served() -> Iterator[Web]:
    """Serve `/KIND/NUMBER` during the block."""
    web = Web()

    class Handler(_Handler):
        pass

    Handler.web = web
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def do_GET(self) -> None:
        _, kind, number = self.path.split("/")
        self.web.asked[self.path] += 1
        with suppress(OSError):  # a client that has had enough
            self._answer("good" if self.web.mended else kind, int(number))

    def _answer(self, kind: str, number: int) -> None:
        content = picture(number)
        if kind == "good":
            time.sleep(self.web.delay_s)
            self._send(content)
        elif kind == "missing":
            self.send_error(404)
        elif kind == "slow":
            time.sleep(_LONGEST_S)
        elif kind == "dripping":
            self._start(len(content))
            deadline = time.monotonic() + _LONGEST_S
            for start in range(0, len(content), 64):
                if time.monotonic() > deadline:
                    break
                self.wfile.write(content[start : start + 64])
                time.sleep(0.2)
        elif kind == "truncated":
            self._start(len(content))
            self.wfile.write(content[: len(content) // 2])
        elif kind == "broken":  # cut before it came to the server, which announces what it has
            self._send(content[: len(content) // 2])
        elif kind == "huge":
            self._start(10**9)
            self._pour(kind)
        elif kind == "endless":
            self._start(None)
            self._pour(kind)
        elif kind == "page":
            page = b"<!DOCTYPE html>\n<html><body>This picture has moved.</body></html>"
            self._send(page, "text/html")
        elif kind == "opted-out":
            self._send(content, robots="noai")

    def _send(self, content: bytes, kind: str = "image/jpeg", robots: str = "") -> None:
        self._start(len(content), kind, robots)
        self.wfile.write(content)

    def _start(self, length: int | None, kind: str = "image/jpeg", robots: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if robots:
            self.send_header("X-Robots-Tag", robots)
        self.end_headers()

    def _pour(self, kind: str) -> None:
        """Send bytes for ever, or rather for a while."""
        deadline = time.monotonic() + _LONGEST_S
        while time.monotonic() < deadline and self.web.sent[kind] < 50_000_000:
            self.web.sent[kind] += self.wfile.write(b"\xff\xd8" + bytes(65_534))

    def log_message(self, *_: object) -> None:
        pass
