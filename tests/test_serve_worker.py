"""`microvlm serve`: the process that runs the models may die, and nothing but its request is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from served import PROGRAM, Server, ask, data_url, picture, refusal, serving, tell

from microvlm.serve.messages import LENGTH, Event, Job, ModelSpec, pack, unpack

pytestmark = pytest.mark.linux
RED = picture(1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def visitor(server):
    with server.client() as client:
        yield client


def test_a_killed_worker_is_replaced_and_every_memory_is_kept(server, visitor):
    first = ask(visitor, "what is this?", RED)
    fact = tell(visitor, "tulip42", "what is the wifi code?")
    before = visitor.get("/api/memory").json()
    killed = server.worker()
    os.kill(killed, signal.SIGKILL)
    given = ask(visitor, "what is the wifi code?")
    assert (given["answer"], given["entry"]) == ("tulip42", fact["id"])
    assert server.worker() != killed
    assert visitor.get("/api/memory").json() == before
    os.kill(server.worker(), signal.SIGKILL)
    assert visitor.post("/api/forget", json={"entry": fact["id"]}).json()["removed"] == [fact["id"]]
    assert ask(visitor, "what is the wifi code?")["source"] == "nothing"
    assert ask(visitor, "what is this?", RED)["answer"] == first["answer"]


def test_a_job_that_a_dying_worker_had_not_taken_is_done_by_the_next_one(server, visitor):
    tell(visitor, "anna", "who?")
    worker, found = server.worker(), []
    os.kill(worker, signal.SIGSTOP)
    thread = threading.Thread(target=lambda: found.append(ask(visitor, "who?")))
    thread.start()
    time.sleep(1)
    os.kill(worker, signal.SIGKILL)
    thread.join()
    assert found[0]["answer"] == "anna"


def test_a_request_that_kills_the_worker_gets_one_sentence(server, visitor):
    """Evidence for a long answer runs for a while, in which the worker is killed."""
    tell(visitor, "anna", "who?")
    with visitor.stream("POST", "/api/evidence", json={"picture": data_url(RED)}) as response:
        assert response.status_code == 200
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        assert json.loads(next(lines))["event"] == "progress"
        os.kill(server.worker(), signal.SIGKILL)
        *_, last = map(json.loads, lines)
    assert last["event"] == "error"
    assert last["error"]["code"] == "worker_died"
    assert ask(visitor, "who?")["answer"] == "anna"


def test_a_client_that_leaves_does_not_stop_the_next(server, visitor):
    for _ in range(3):
        with server.client() as other, other.stream("POST", "/api/ask", json={"picture": data_url(RED)}):
            pass
    assert ask(visitor, "what is this?", RED)["source"] == "picture"


def test_the_worker_ends_with_its_server():
    with serving() as server:
        worker = server.worker()
        server.process.kill()
        server.process.wait()
        for _ in range(600):
            if not os.path.exists(f"/proc/{worker}") or is_zombie(worker):
                return
            time.sleep(0.1)
    raise AssertionError("the worker outlives its server")


def is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def test_frames_keep_what_they_carry_and_a_worker_refuses_what_it_cannot_do():
    job = Job("ask", ModelSpec("no-such-model", "no-such-model", "ort"), question="é?")
    frame = pack(job)
    assert LENGTH.unpack(frame[:4]) == (len(frame) - 4,)
    assert unpack(frame[4:], Job) == job
    program = "from microvlm.serve.worker.process import main; main()"
    process = subprocess.run(
        [sys.executable, "-P", "-c", program], input=frame + b"\x09\0\0\0x", capture_output=True, timeout=300
    )
    output, found = process.stdout, []
    while output:
        (length,) = LENGTH.unpack(output[:4])
        found.append(unpack(output[4 : 4 + length], Event))
        output = output[4 + length :]
    assert [event.kind for event in found] == ["begun", "refused"]
    assert (found[1].status, process.returncode) == (400, 0)
    assert "no-such-model" in found[1].text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nano", "--backend", "tpu"), "unknown backend 'tpu'"),
        (("no-such-model",), "no-such-model"),
        (("nano", "--token", "short"), "--token must have at least 16 printable ASCII characters"),
        (("nano", "--host", "no.such.host"), "--host no.such.host is no address of this machine"),
        (("nano", "--queue", "0"), "--queue is 0; give 1 or more."),
    ],
)
def test_a_bad_start_is_one_sentence_and_status_2(arguments, sentence):
    process = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("Error: ")
    assert sentence in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_another_address_than_this_machines_gets_a_token_that_clients_need():
    with serving("--host", "0.0.0.0") as server:
        assert server.token is not None
        assert len(server.token) >= 32
        with server.client() as client:
            assert client.get("/api/state").status_code == 200
            assert client.get("/api/state", headers={"Host": "192.168.1.7:8000"}).status_code == 200
            assert client.get("/api/state", headers={"Host": "evil.example"}).status_code == 421
            for headers in (
                {"Authorization": ""},
                {"Authorization": "Bearer x"},
                {"Authorization": f"Basic {server.token}"},
            ):
                assert refusal(client.get("/api/state", headers=headers))[0] == 401
            assert client.get("/", headers={"Authorization": ""}).status_code == 200
            assert server.token not in client.get("/").text
