"""`microvlm serve`: every limit is refused in one sentence with a fitting status, and strangers are kept out."""

from __future__ import annotations

import io
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image
from served import Server, ask, data_url, picture, refusal, serving, tell

from microvlm.errors import UserError
from microvlm.serve.guard import host_name, is_address, is_loopback
from microvlm.serve.limits import Limits
from microvlm.serve.memories import Memory, Sessions
from microvlm.serve.messages import Event, ModelSpec, NewRow
from microvlm.serve.refusal import Refusal
from microvlm.serve.server import Address, application, bound, configuration
from microvlm.serve.service import ServedModel, Service

RED = picture(1)
MB = 1_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    small = ("--picture-mb", "1", "--megapixels", "1", "--queue", "2", "--sessions", "6")
    with serving(*small, "--request-seconds", "10", "--allow-host", "pi.local") as server:
        yield server


@pytest.fixture
def visitor(server):
    with server.client() as client:
        yield client


def test_too_large_a_picture_is_413(visitor):
    status, sentence = refusal(visitor.post("/api/ask", json={"picture": data_url(bytes(MB + 1))}))
    assert (status, sentence) == (
        413,
        "the picture has 1.0 MB, more than the 1 MB taken here: send a smaller one.",
    )
    status, sentence = refusal(visitor.post("/api/ask", json={"picture": data_url(bytes(3 * MB))}))
    assert status == 413
    assert "the request is larger than the 2 MB taken here" in sentence


def test_too_many_pixels_are_413(visitor):
    stream = io.BytesIO()
    Image.new("L", (1100, 1000)).save(stream, "PNG")
    status, sentence = refusal(visitor.post("/api/ask", json={"picture": data_url(stream.getvalue())}))
    assert (status, sentence) == (
        413,
        "the picture is 1100 x 1000 pixels, more than the 1 million taken here; scale it down first.",
    )


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/ask", {"picture": data_url(b"text")}, 400, "not a picture in a format read here"),
        ("/api/ask", {"picture": data_url(RED[:200])}, 400, "damaged picture"),
        ("/api/ask", {"picture": "data:image/png;base64,!!"}, 400, "base64 is damaged"),
        ("/api/ask", {"picture": "data:image/png;base64,"}, 400, "empty"),
        ("/api/ask", {"picture": "cat.png"}, 400, "sent as a data URL"),
        ("/api/ask", {"picture": "http://localhost/cat.png"}, 400, "not fetched"),
        ("/api/ask", {}, 400, "ask a question, show a picture, or both"),
        ("/api/ask", {"question": 3}, 400, "question"),
        ("/api/ask", {"question": "x", "colour": 3}, 400, "colour"),
        ("/api/ask", {"question": "x", "model": "other"}, 404, "choose one of nano"),
        ("/api/ask", {"question": "x", "max_new_tokens": 0}, 400, "give 1 to 1024"),
        ("/api/ask", {"question": "word " * 9000}, 400, "shorten it"),
        ("/api/ask", {"question": "what was in the ninth image?"}, 400, "no picture was shown as the ninth"),
        ("/api/tell", {"text": " "}, 400, "write the fact"),
        ("/api/tell", {"text": "a <|end|>", "question": "what?"}, 400, "special tokens"),
        ("/api/forget", {"entry": 99}, 404, "nothing to forget"),
        ("/api/evidence", {"question": "x"}, 400, "send the picture"),
        ("/nowhere", {}, 404, "nothing at this address"),
        ("/api/state", {}, 405, "POST is not for this address"),
    ],
)
def test_a_bad_request_is_refused(server, path, body, status, words):
    with server.client() as visitor:
        given, sentence = refusal(visitor.post(path, json=body))
        assert given == status
        assert words in sentence


def test_what_is_not_json_is_refused(visitor):
    json = {"Content-Type": "application/json"}
    assert refusal(visitor.post("/api/ask", content=b"{", headers=json))[0] == 400
    assert refusal(visitor.post("/api/ask", content=b"[" * 100_000, headers=json))[0] == 400
    assert refusal(visitor.post("/api/ask", content=b"\xff\xfe", headers=json))[0] == 400
    assert refusal(visitor.post("/api/ask", content=b"question=x"))[0] == 415


@pytest.mark.linux
def test_a_full_queue_is_503_a_greedy_visitor_429_and_a_slow_answer_504(server):
    """The worker is stopped, so that what comes first is never answered and the others wait."""
    with server.client() as first, server.client() as second:
        for each in (first, second):
            tell(each, "anna", "who?")
        os.kill(server.worker(), signal.SIGSTOP)
        found: list[tuple[int, str]] = []

        def send(client):
            response = client.post("/api/ask", json={"question": "who?"})
            found.append((200, "") if response.status_code == 200 else refusal(response))

        threads = []
        for client, waits in ((first, True), (first, True), (first, True), (first, False), (second, False)):
            if waits:
                threads.append(threading.Thread(target=send, args=(client,)))
                threads[-1].start()
                time.sleep(0.5)
            else:
                send(client)
        assert [status for status, _ in found] == [429, 503]
        assert "of your requests are not answered yet" in found[0][1]
        assert "requests wait for the model, as many as may" in found[1][1]
        for thread in threads:
            thread.join()
        slow = [status for status, _ in found[2:] if status not in (200, 503)]
        assert (len(found), slow) == (5, [504])
        assert any("took longer than 10 seconds and was stopped" in sentence for _, sentence in found)
        assert ask(first, "who?")["answer"] == "anna"


def test_more_visitors_than_there_may_be_are_503(server):
    clients = [server.client() for _ in range(8)]
    try:
        statuses = [
            client.post("/api/tell", json={"text": "anna", "question": "who?"}).status_code
            for client in clients
        ]
        assert set(statuses) == {200, 503}
        assert statuses[-1] == 503
        status, sentence = refusal(clients[-1].post("/api/ask", json={"question": "who?"}))
        assert (status, sentence) == (
            503,
            "the server holds 6 conversations, as many as it may; try again later.",
        )
        page = clients[-1].get("/")
        assert page.status_code == 200
    finally:
        for client in clients:
            client.close()


def test_an_idle_conversation_makes_room_for_another():
    now = [0.0]
    sessions = Sessions(Limits(sessions=2, idle_s=10), lambda: now[0])
    first, second = sessions.find_or_begin(None), sessions.find_or_begin("not ours")
    with pytest.raises(Refusal, match="holds 2 conversations"):
        sessions.find_or_begin(None)
    now[0] = 9
    assert sessions.find(second.id) is second
    now[0] = 12
    assert sessions.find(first.id) is None
    assert len({first.id, second.id, sessions.find_or_begin(first.id).id}) == 3
    assert len(sessions) == 2


def test_ids_of_a_memorys_rows_stay_when_others_are_forgotten():
    memory = Memory()
    memory.apply(Event("done", added=[NewRow(b"a", {"told": True}), NewRow(b"b", {"told": False})]))
    changes = memory.apply(Event("done", removed=[0], added=[NewRow(b"c", {"told": True})]))
    assert changes == {"added": [{"id": 3, "told": True}], "removed": [1]}
    assert [(row.id, row.content) for row in memory.rows] == [(2, b"b"), (3, b"c")]
    assert (memory.index_of(3), memory.facts, memory.revision) == (1, 1, 2)
    with pytest.raises(Refusal, match="forgotten already"):
        memory.index_of(1)


@pytest.fixture
def impatient() -> Iterator[int]:
    """The port of a server that waits a second for what a client sends; its model is never asked."""
    import uvicorn

    limits = Limits(receive_s=1)
    spec = ModelSpec("none", "none", "ort")
    service = Service([ServedModel("none", spec)], limits)
    with bound("127.0.0.1", 0) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1], None)
        app = application(service, address, address.port)
        server = uvicorn.Server(configuration(app, limits))
        listener.listen()
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield address.port
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: x", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"]
)
def test_a_connection_without_a_whole_request_is_closed(impatient, sent):
    with socket.create_connection(("127.0.0.1", impatient), timeout=60) as connection:
        connection.sendall(sent)
        while connection.recv(65536):
            pass


def test_a_body_that_comes_too_slowly_is_408(impatient):
    head = "POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", impatient), timeout=60) as connection:
        connection.sendall(head.encode())
        content = b""
        while piece := connection.recv(65536):
            content += piece
    assert content.startswith(b"HTTP/1.1 408")
    assert b"did not come within 1 seconds" in content


def test_a_limit_below_one_is_refused():
    with pytest.raises(UserError, match="the limit 'receive_s' is 0; give 1 or more"):
        Limits(receive_s=0)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1234", 200),
        ("[::1]:1234", 200),
        ("127.0.0.1", 200),
        ("PI.local:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:8000", 421),
        ("192.168.1.7", 421),
        ("", 421),
    ],
)
def test_only_its_own_names_reach_a_server(visitor, host, status):
    assert visitor.get("/api/state", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 400),
        ({}, 400),
    ],
)
def test_a_page_of_another_site_cannot_ask(visitor, headers, status):
    assert refusal(visitor.post("/api/ask", json={}, headers=headers))[0] == status


def test_the_page_may_run_nothing_but_its_own_program(visitor):
    response = visitor.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert response.headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in response.headers
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert visitor.get("/api/state").headers["content-security-policy"].startswith("default-src 'none'")


def test_names_of_hosts_are_read_as_browsers_write_them():
    assert [host_name(host) for host in ("Pi:80", "[::1]:80", "[::1]", "a.b.", "")] == [
        "pi",
        "::1",
        "::1",
        "a.b",
        "",
    ]
    assert [is_address(name) for name in ("192.168.1.7", "fe80::1%eth0", "localhost", "1.2.3")] == [
        True,
        True,
        False,
        False,
    ]
    assert [is_loopback(host) for host in ("localhost", "127.0.0.5", "::1", "0.0.0.0", "pi.local")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be used .*: give another --port"):
            bound("127.0.0.1", port)
    with pytest.raises(UserError, match=r"--host no\.such\.host is no address of this machine"):
        bound("no.such.host", 0)
