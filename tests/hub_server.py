"""A small Hugging Face hub on 127.0.0.1: enough of its protocol for huggingface_hub, with faults that a test sets."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_LARGE = 2000
"""Files from this size on are described by SHA-256, as those in Git LFS; smaller ones by Git's hash."""


@dataclass
class Hub:
    """What the server holds and has done."""

    repositories: dict[str, tuple[str, dict[str, bytes]]]
    """`models/OWNER/NAME` or `datasets/OWNER/NAME` -> commit, and content by file name."""
    url: str = ""
    sent: Counter = field(default_factory=Counter)
    """Bytes of content by file name."""
    broken: dict[str, int] = field(default_factory=dict)
    """File name -> bytes after which the connection is closed."""
    altered: set[str] = field(default_factory=set)
    """Files that are sent with another content than the hub describes."""
    refused: dict[str, int] = field(default_factory=dict)
    """File name -> status."""


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """Serve a hub during the block."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        listing = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/(.+))?", path)
        content = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if listing:
            self._list(listing[1], listing[2])
        elif content:
            self._send_file(f"{content[1] or 'models/'}{content[2]}", content[3], content[4])
        else:
            self._fail(404)

    def _list(self, repository: str, revision: str | None) -> None:
        if repository not in self.hub.repositories:
            return self._fail(401, "RepoNotFound")
        commit, files = self.hub.repositories[repository]
        if revision not in (None, "main", commit):
            return self._fail(404, "RevisionNotFound")
        siblings = []
        for name, content in files.items():
            sibling = {"rfilename": name, "size": len(content)}
            sibling["blobId"] = hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()
            if len(content) >= _LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        body = json.dumps({"id": repository.partition("/")[2], "sha": commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, repository: str, revision: str, name: str) -> None:
        commit, files = self.hub.repositories[repository]
        if name in self.hub.refused:
            return self._fail(self.hub.refused[name])
        if revision != commit or name not in files:
            return self._fail(404, "EntryNotFound")
        content = files[name]
        if name in self.hub.altered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = min(len(content), self.hub.broken.get(name, len(content)))
        self.wfile.write(content[start:end])
        self.hub.sent[name] += max(0, end - start)
        self.close_connection = True

    def _fail(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
