"""A real `microvlm serve` in a process of its own, on a free port of this machine, and what its clients send."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

PROGRAM = "from microvlm.cli import main; main()"
START_S = 300.0
"""An export of nano may come first, on a machine that does much else."""


@dataclass
class Server:
    """A server that runs."""

    url: str
    token: str | None
    process: subprocess.Popen[str]

    def client(self, **keywords: Any) -> httpx.Client:
        """A visitor with cookies of their own, who is nobody's proxy."""
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False, **keywords)

    def worker(self) -> int:
        """Process id of the worker, once it runs. Linux only."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for _ in range(600):
            if pids := children.read_text().split():
                return int(pids[0])
            time.sleep(0.1)
        raise AssertionError("the server has no worker")


@contextmanager
def serving(*arguments: str, models: tuple[str, ...] = ("nano",), backend: str = "ort") -> Iterator[Server]:
    """Run a server within the block, which ends it as Ctrl-C does."""
    command = [sys.executable, "-P", "-c", PROGRAM, "serve", *models, "--backend", backend]
    process = subprocess.Popen(
        [*command, "--port", "0", "--threads", "1", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith("http://"), f"the server printed {line!r} and ended with {process.poll()}"
        url, _, token = line.partition("/#token=")
        host_and_port = url.removeprefix("http://")
        port = host_and_port.rpartition(":")[2]
        yield Server(f"http://127.0.0.1:{port}", token or None, process)
    finally:
        process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def picture(seed: int, side: int = 96) -> bytes:
    """A PNG of coloured squares, another one for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The server-sent events of a response, `[DONE]` left out."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def ask(
    client: httpx.Client, question: str = "", content: bytes | None = None, **fields: Any
) -> dict[str, Any]:
    """Ask -> the last event, which must be an answer."""
    body = {"question": question, **fields}
    if content is not None:
        body["picture"] = data_url(content)
    response = client.post("/api/ask", json=body)
    assert response.status_code == 200, response.text
    (*pieces, last) = events(response)
    assert last["event"] == "done", last
    assert "".join(piece["text"] for piece in pieces).strip() == last["answer"]
    return last


def tell(client: httpx.Client, text: str, question: str = "", content: bytes | None = None) -> dict[str, Any]:
    """Tell a fact -> its entry."""
    body = {"text": text, "question": question}
    if content is not None:
        body["picture"] = data_url(content)
    response = client.post("/api/tell", json=body)
    assert response.status_code == 200, response.text
    (entry,) = response.json()["added"]
    return entry


def refusal(response: httpx.Response) -> tuple[int, str]:
    """Status and sentence of what must be one refusal in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert error["message"].endswith((".", "'."))
    return response.status_code, error["message"]
