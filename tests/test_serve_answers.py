"""`microvlm serve`: the page's interface answers, remembers and forgets as a chat does."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from served import Server, ask, data_url, events, picture, refusal, serving, tell

from microvlm.loaded_model import load
from microvlm.memory.conversation import Chat
from microvlm.memory.facts import FactMemory
from microvlm.memory.pointing.pointer import NOT_FOUND

RED, BLUE = picture(1), picture(2)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def visitor(server):
    with server.client() as client:
        yield client


def test_answers_are_those_of_a_chat(visitor):
    chat = Chat(load("nano", "ort", 1))
    for question, content in (("what is this?", RED), ("what is this?", BLUE), ("what color is it?", RED)):
        turn = chat.ask(question, content)
        given = ask(visitor, question, content)
        assert (given["answer"], given["declined"], given["stored"]) == (
            turn.answer,
            turn.declined,
            turn.stored,
        )
        assert given["source"] == "picture"
    turn = chat.ask("what was in the second image?")
    given = ask(visitor, "what was in the second image?", RED)
    assert (given["answer"], given["confidence"]) == (turn.answer, pytest.approx(turn.confidence, abs=1e-6))
    rows = visitor.get("/api/memory").json()["entries"]
    assert [row["text"] for row in rows] == [entry.value for entry in chat.memory.entries]
    assert np.allclose([row["weights"] for row in rows], [e.key for e in chat.memory.entries], atol=1e-3)


def test_a_told_fact_answers_first_and_is_gone_once_it_is_forgotten(visitor):
    fact = tell(visitor, "zuzana", "whose is this?", RED)
    assert fact["told"]
    assert fact["about_picture"]
    assert len(fact["weights"]) == visitor.get("/api/memory").json()["slots"] == 64
    given = ask(visitor, "whose is this?", RED)
    assert (given["answer"], given["source"], given["entry"]) == ("zuzana", "memory", fact["id"])
    assert given["confidence"] > 0.9
    chat = Chat(load("nano", "ort", 1))
    FactMemory(chat.runtime, chat.processor, chat.memory).write("zuzana", "whose is this?", RED)
    for question, content in (
        ("what is this?", BLUE),
        ("whose is this?", BLUE),
        ("who made the moon?", None),
    ):
        turn = chat.ask(question, content)
        given = ask(visitor, question, content)
        assert (given["answer"], given["source"] == "memory") == (turn.answer, turn.from_memory)
    response = visitor.post("/api/forget", json={"entry": fact["id"]})
    assert response.json() == {"added": [], "removed": [fact["id"]]}
    assert ask(visitor, "whose is this?", RED)["source"] == "picture"
    assert refusal(visitor.post("/api/forget", json={"entry": fact["id"]}))[0] == 404


def test_without_a_picture_the_memory_answers_or_says_that_it_does_not_know(visitor):
    assert ask(visitor, "what is the wifi code?")["answer"] == NOT_FOUND
    tell(visitor, "tulip42", "what is the wifi code?")
    assert ask(visitor, "what is the wifi code")["answer"] == "tulip42"
    response = visitor.post("/api/forget", json={})
    assert len(response.json()["removed"]) == 1
    assert ask(visitor, "what is the wifi code?")["source"] == "nothing"


def test_two_visitors_have_memories_of_their_own(server):
    with server.client() as one, server.client() as two:
        tell(one, "anna", "whose is this?", RED)
        tell(two, "ben", "whose is this?", RED)
        assert ask(one, "whose is this?", RED)["answer"] == "anna"
        assert ask(two, "whose is this?", RED)["answer"] == "ben"
        assert [row["text"] for row in one.get("/api/memory").json()["entries"] if row["told"]] == ["anna"]
    with server.client() as third:
        assert third.get("/api/memory").json()["entries"] == []
        assert ask(third, "whose is this?", RED)["source"] == "picture"


def test_a_cookie_that_the_server_did_not_give_is_replaced(server):
    with server.client() as visitor:
        name = f"microvlm_session_{server.url.rpartition(':')[2]}"
        response = visitor.post(
            "/api/tell", json={"text": "anna", "question": "who?"}, headers={"Cookie": f"{name}=mine"}
        )
        cookie = response.headers["set-cookie"]
        assert cookie.startswith(f"{name}=")
        assert not cookie.startswith(f"{name}=mine")
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie


def test_evidence_has_a_map_for_every_word_and_tells_how_far_it_is(visitor):
    response = visitor.post("/api/evidence", json={"question": "what is this?", "picture": data_url(RED)})
    (*steps, last) = events(response)
    assert [step["event"] for step in steps] == ["progress"] * len(steps)
    assert steps[-1]["done"] == steps[-1]["total"] == 82
    assert [each["word"] for each in last["maps"]] == last["answer"].split()
    assert {np.shape(each["weights"]) for each in last["maps"]} == {(8, 8)}
    assert last["scale"] >= max(np.max(each["weights"]) for each in last["maps"])
    assert visitor.get("/api/memory").json()["entries"] == []


def test_attention_is_refused_where_the_backend_gives_none(visitor):
    response = visitor.post("/api/attention", json={"picture": data_url(RED)})
    assert refusal(response) == (
        400,
        "the backend 'ort' gives no attention weights: ask for the evidence, or choose torch.",
    )


def test_a_full_memory_forgets_what_was_said_before_what_was_told():
    from microvlm.serve.worker.tasks import forget_oldest_turns

    model = load("nano", "ort", 1)
    chat = Chat(model)
    chat.ask("what is this?", RED)
    FactMemory(model, memory=chat.memory).write("anna", "whose is this?", RED)
    chat.ask("what is this?", BLUE)
    assert [(entry.told, entry.image) for entry in chat.memory.entries] == [
        (False, True),
        (False, False),
        (True, False),
        (False, True),
        (False, False),
    ]
    newest = chat.memory.entries[-1]
    forget_oldest_turns(model, chat.memory, 3)
    assert [entry.image for entry in chat.memory.entries] == [True, False, True, False]
    assert chat.memory.entries[-1] is newest
    forget_oldest_turns(model, chat.memory, 0)
    assert [entry.value for entry in chat.memory.entries] == ["anna"]


def test_a_memory_is_the_same_after_its_rows_were_bytes():
    from microvlm.serve.worker.stored_rows import encode_row, memory_of

    model = load("nano", "ort", 1)
    facts = FactMemory(model)
    facts.write("anna", "whose is this?", RED, "red.png")
    facts.write("tulip42", "what is the wifi code?")
    again = memory_of(model.runtime, [encode_row(entry) for entry in facts.entries])
    assert [(e.text, e.question, e.picture, e.value) for e in again.entries] == [
        (e.text, e.question, e.picture, e.value) for e in facts.entries
    ]
    for old, new in zip(facts.memory.states[0], again.states[0], strict=True):
        assert np.array_equal(old, new)
    assert encode_row(again.entries[0]) == encode_row(facts.entries[0])


def test_a_photograph_is_turned_upright_and_named_in_the_memory(visitor):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(RED)).save(stream, "JPEG", exif=exif)
    given = ask(visitor, "what is this?", stream.getvalue(), label="mine.jpg")
    assert given["answer"] == Chat(load("nano", "ort", 1)).ask("what is this?", stream.getvalue()).answer


def test_backends_of_a_model_share_a_memory_and_torch_gives_attention():
    with serving("--backend", "torch") as server, server.client() as visitor:
        models = [model["id"] for model in visitor.get("/api/state").json()["models"]]
        assert models == ["nano", "nano:torch"]
        tell(visitor, "anna", "whose is this?", RED)
        assert ask(visitor, "whose is this?", RED, model="nano:torch")["answer"] == "anna"
        body = {"question": "what is this?", "picture": data_url(RED), "model": "nano:torch"}
        last = events(visitor.post("/api/attention", json=body))[-1]
        assert [each["word"] for each in last["maps"]] == last["answer"].split()
        assert {np.shape(each["weights"]) for each in last["maps"]} == {(8, 8)}
        tell(visitor, "ben", "who?")
        assert ask(visitor, "who?", model="nano:torch")["answer"] == "ben"
