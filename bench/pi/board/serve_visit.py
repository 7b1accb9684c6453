"""Visits `microvlm serve`: starts it, asks it over HTTP, and reads the memory of its two processes from Linux.

A program of the standard library alone, so that it runs on a board and takes little of its memory. The last line of
stdout is one JSON document: `answers` and `memory`. Exit status 1: a request that was not answered.
"""

from __future__ import annotations

import base64
import http.client
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

PROGRAM = "from microvlm.cli import main; main()"
QUESTION, FACT = "whose is this?", "zuzana"
FLAGS = ("--backend", "ort", "--port", "0", "--request-seconds", "3600")
"""An emulated board takes minutes for what a real one does in seconds."""
SAMPLE_S, TIMEOUT_S = 0.5, 3600
_KB = 1024
_FIELDS = {"VmRSS": "rss_bytes", "RssAnon": "anonymous_bytes", "RssFile": "file_backed_bytes"}


class Failed(Exception):
    """A request that was not answered, as one sentence."""


class Memory:
    """The largest resident memory of the server and of its worker, sampled by a thread until `stop`."""

    def __init__(self, server: int):
        self._server = server
        self._over = threading.Event()
        self.peaks: dict[str, dict[str, int]] = {}
        """`server`, `worker` and `together`: field -> bytes; of `together` at one moment, with `pss_bytes`."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, dict[str, int]]:
        """Take the last sample -> the peaks."""
        self._over.set()
        self._thread.join()
        return self.peaks

    def _run(self) -> None:
        while True:
            is_over = self._over.wait(SAMPLE_S)
            self._sample()
            if is_over:
                return

    def _sample(self) -> None:
        children = _read(f"/proc/{self._server}/task/{self._server}/children").split()
        sums: dict[str, int] = {}
        for name, pid in [("server", str(self._server)), *(("worker", child) for child in children)]:
            status = _kilobytes(_read(f"/proc/{pid}/status"))
            if "VmRSS" not in status:
                continue
            now = {label: status[field] * _KB for field, label in _FIELDS.items()}
            # The kernel's own mark: a sample may miss a peak, and this does not.
            self._keep(name, {**now, "peak_rss_bytes": status["VmHWM"] * _KB})
            now["pss_bytes"] = _kilobytes(_read(f"/proc/{pid}/smaps_rollup")).get("Pss", 0) * _KB
            for label, value in now.items():
                sums[label] = sums.get(label, 0) + value
        self._keep("together", sums)

    def _keep(self, name: str, values: dict[str, int]) -> None:
        known = self.peaks.setdefault(name, {})
        for label, value in values.items():
            known[label] = max(value, known.get(label, 0))


class Visitor:
    """Asks a server, as one visitor."""

    def __init__(self, port: int):
        self._port, self._cookie = port, ""

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The document of a response, of a stream its last event. Raises Failed."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json", "Cookie": self._cookie}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
        self._cookie = (response.headers["Set-Cookie"] or self._cookie).partition(";")[0]
        connection.close()
        if response.status != 200:
            raise Failed(f"{method} {path} was answered {response.status}: {text}")
        document = json.loads([line for line in text.splitlines() if line][-1].removeprefix("data: "))
        if document.get("event") == "error":
            raise Failed(f"{method} {path} was answered {document}")
        return document


def visit(port: int, picture: str) -> list[dict[str, str]]:
    """Health, a caption, a fact and its recall -> `request`, `answer` and `source` of each. Raises Failed."""
    visitor = Visitor(port)
    content = Path(picture).read_bytes()
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    state = visitor.ask("GET", "/api/state")
    caption = visitor.ask("POST", "/api/ask", {"picture": url})
    visitor.ask("POST", "/api/tell", {"picture": url, "question": QUESTION, "text": FACT})
    entries = visitor.ask("GET", "/api/memory")["entries"]
    recall = visitor.ask("POST", "/api/ask", {"picture": url, "question": QUESTION})
    return [
        {"request": "health", "answer": state["models"][0]["id"], "source": "server"},
        {"request": "caption", "answer": caption["answer"], "source": caption["source"]},
        {"request": "fact", "answer": f"{len(entries)} entries", "source": "memory"},
        {"request": "recall", "answer": recall["answer"], "source": recall["source"]},
    ]


def main(model: str, picture: str, *flags: str) -> int:
    command = [sys.executable, "-c", PROGRAM, "serve", model, *FLAGS, *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory = Memory(server.pid)
    try:
        assert server.stdout is not None
        line = server.stdout.readline().strip()
        if not line.startswith("http://"):
            raise Failed(f"the server printed {line!r} in place of its address")
        answers = visit(int(line.rpartition(":")[2].rstrip("/")), picture)
    except (Failed, OSError, http.client.HTTPException) as problem:
        print(f"Error: {problem}", file=sys.stderr)
        return 1
    finally:
        peaks = memory.stop()
        server.send_signal(signal.SIGINT)
        server.wait()
    print(json.dumps({"answers": answers, "memory": peaks}))
    return 0


def _kilobytes(text: str) -> dict[str, int]:
    """Name -> value of the lines `NAME: VALUE kB`."""
    words = [line.split() for line in text.splitlines()]
    return {word[0].rstrip(":"): int(word[1]) for word in words if len(word) == 3 and word[2] == "kB"}


def _read(path: str) -> str:
    """Empty where the process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
