"""A thousand requests of eight clients to `microvlm serve`, a third of them hostile; run by `nox -s page`.

Every right answer must be the one that a client's own fact or picture has, every hostile request must be refused, and
the server must live on in as much memory as before. Prints what it counted; exit status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
from served import Server, data_url, events, picture, serving, tell

from microvlm.loaded_model import load
from microvlm.memory.conversation import Chat

CLIENTS = 8
MAX_GROWTH = 1.25
"""The most by which server and worker may grow from the first quarter of the requests to the end."""
BUSY = (429, 503)
OWN_QUESTION = "what is the wifi code?"
PICTURES = {seed: picture(seed) for seed in range(4)}


class Client(threading.Thread):
    """One visitor, who knows what must be answered."""

    def __init__(self, server: Server, number: int, requests: int, expected: dict[int, str]):
        super().__init__()
        self._server, self._number, self._requests, self._expected = server, number, requests, expected
        self._random = random.Random(number)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        with self._server.client() as visitor:
            tell(visitor, f"tulip {self._number}", OWN_QUESTION)
            for _ in range(self._requests):
                try:
                    kind = self._random.choice(KINDS)
                    kind(self, visitor)
                    self.counts[kind.__name__.strip("_")] += 1
                except Exception as error:  # any failure is a finding, and the others must go on
                    self.wrong.append(f"client {self._number}: {type(error).__name__}: {error}")

    def _own_fact(self, visitor: httpx.Client) -> None:
        answer = self._patiently(visitor, {"question": OWN_QUESTION})
        assert answer == f"tulip {self._number}", f"not the client's own fact: {answer!r}"

    def _seen(self, visitor: httpx.Client) -> None:
        seed = self._random.choice(list(PICTURES))
        body = {"question": "what is this?", "picture": data_url(PICTURES[seed])}
        answer = self._patiently(visitor, body)
        assert answer == self._expected[seed], f"{answer!r} is not {self._expected[seed]!r}"

    def _patiently(self, visitor: httpx.Client, body: dict[str, str]) -> str:
        """The answer, asked for again while the server is busy."""
        while True:
            response = visitor.post("/api/ask", json=body)
            if response.status_code not in BUSY:
                last = events(response)[-1]
                assert last["event"] == "done", response.text
                return str(last["answer"])
            self.counts["busy"] += 1
            time.sleep(0.2)

    def _refused(self, visitor: httpx.Client, statuses: tuple[int, ...], **request: object) -> None:
        response = visitor.post("/api/ask", **request)  # type: ignore[arg-type]
        allowed = (*statuses, *BUSY)
        assert response.status_code in allowed, f"{response.status_code} is not in {allowed}: {response.text}"
        assert response.json()["error"]["message"].endswith("."), response.text

    def _huge(self, visitor: httpx.Client) -> None:
        self._refused(visitor, (413,), json={"picture": data_url(bytes(3_000_000))})

    def _no_picture(self, visitor: httpx.Client) -> None:
        self._refused(visitor, (400,), json={"picture": data_url(self._random.randbytes(2000))})

    def _half_a_picture(self, visitor: httpx.Client) -> None:
        self._refused(visitor, (400,), json={"picture": data_url(PICTURES[0][:150])})

    def _wrong_json(self, visitor: httpx.Client) -> None:
        headers = {"Content-Type": "application/json"}
        self._refused(visitor, (400,), content=self._random.randbytes(100), headers=headers)

    def _cut_off(self, visitor: httpx.Client) -> None:
        head = b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with self._connection() as connection:
            connection.sendall(head + b'Content-Length: 100000\r\n\r\n{"question"')

    def _slow(self, visitor: httpx.Client) -> None:
        connection = self._connection()
        connection.sendall(b"POST /api/ask HTTP/1.1\r\nHost: loc")
        threading.Timer(5, connection.close).start()

    def _leaver(self, visitor: httpx.Client) -> None:
        with visitor.stream("POST", "/api/ask", json={"picture": data_url(PICTURES[1])}):
            pass

    def _connection(self) -> socket.socket:
        host, _, port = self._server.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=60)


HONEST = [Client._own_fact, Client._seen]
HOSTILE = [
    Client._huge,
    Client._no_picture,
    Client._half_a_picture,
    Client._wrong_json,
    Client._cut_off,
    Client._slow,
    Client._leaver,
]
KINDS = HONEST * 7 + HOSTILE


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    requests = parser.parse_args().requests
    chat = Chat(load("nano", "ort", 1))
    expected = {seed: chat.ask("what is this?", content).answer for seed, content in PICTURES.items()}
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    sizes: list[tuple[float, float]] = []
    with serving("--picture-mb", "1", "--sessions", "64") as server:
        worker = server.worker()
        for _ in range(4):
            clients = [
                Client(server, number, requests // (4 * CLIENTS), expected) for number in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
                counts += client.counts
                wrong += client.wrong
            sizes.append((rss_mb(server.process.pid), rss_mb(worker)))
        if server.process.poll() is not None or server.worker() != worker:
            wrong.append("the server or its worker ended")
    for name, first, last in zip(("server", "worker"), sizes[0], sizes[-1], strict=True):
        print(f"{name}: {first:.0f} MB after a quarter, {last:.0f} MB at the end")
        if last > first * MAX_GROWTH:
            wrong.append(f"the {name} grew from {first:.0f} to {last:.0f} MB")
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"{len(wrong)} findings", *wrong[:20], sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
