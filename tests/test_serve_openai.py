"""`microvlm serve`: the real `openai` package talks to it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from served import Server, ask, data_url, events, picture, serving, tell

from microvlm.loaded_model import load
from microvlm.memory.conversation import Chat

RED = picture(1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--token", "a-token-of-our-own-0123") as server:
        server.token = "a-token-of-our-own-0123"
        yield server


@pytest.fixture
def client(server):
    import httpx

    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key=server.token,
        max_retries=0,
        http_client=httpx.Client(trust_env=False),
    ) as client:
        yield client


def about(content: bytes, text: str = "what is this?") -> list[dict]:
    parts = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data_url(content), "detail": "low"}},
    ]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "microvlm"
    with pytest.raises(openai.NotFoundError, match="choose one of nano"):
        client.models.retrieve("gpt-4o")


def test_an_answer_is_that_of_a_chat_with_its_tokens_counted(client):
    model = load("nano", "ort", 1)
    turn = Chat(model).ask("what is this?", RED)
    completion = client.chat.completions.create(model="nano", messages=about(RED))
    choice = completion.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", turn.answer)
    assert choice.finish_reason == "stop"
    usage = completion.usage
    assert usage.prompt_tokens == len(model.processor.prompt_ids("what is this?", 1))
    assert usage.completion_tokens == len(turn.tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert completion.microvlm == {
        "source": "picture",
        "confidence": turn.answer_confidence,
        "declined": turn.declined,
    }


def test_a_stream_has_the_same_answer_and_a_last_chunk_with_the_counts(client):
    whole = client.chat.completions.create(model="nano", messages=about(RED))
    chunks = list(
        client.chat.completions.create(
            model="nano", messages=about(RED), stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_an_answer_at_its_longest_says_so(client):
    completion = client.chat.completions.create(model="nano", messages=about(RED), max_tokens=1)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 1


def test_a_picture_of_an_earlier_message_stays_in_view(client):
    messages = [*about(RED), {"role": "assistant", "content": "a thing"}]
    messages.append({"role": "user", "content": "what color is it?"})
    completion = client.chat.completions.create(model="nano", messages=messages)
    expected = Chat(load("nano", "ort", 1)).ask("what color is it?", RED).answer
    assert completion.choices[0].message.content == expected


def test_a_client_without_a_cookie_has_no_memory_and_one_with_a_visitors_cookie_has_theirs(client, server):
    with server.client() as visitor:
        tell(visitor, "zuzana", "whose is this?", RED)
        cookie = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
        question = about(RED, "whose is this?")
        alone = client.chat.completions.create(model="nano", messages=question)
        assert alone.microvlm["source"] == "picture"
        known = client.chat.completions.create(
            model="nano", messages=question, extra_headers={"Cookie": cookie}
        )
        assert (known.choices[0].message.content, known.microvlm["source"]) == ("zuzana", "memory")
        assert ask(visitor, "whose is this?", RED)["answer"] == "zuzana"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "end with the user's question"),
        ({"messages": [{"role": "user", "content": "  "}]}, "ask a question, show a picture, or both"),
        ({"n": 2}, "leave 'n' out"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported"),
        ({"stop": ["x"]}, "'stop' is not supported"),
        ({"response_format": {"type": "json_object"}}, "answers are plain text"),
        ({"max_tokens": 0}, "'max_tokens' is 0"),
        ({"temperature": 9}, "temperature"),
        ({"messages": about(b"no picture")}, "not a picture in a format read here"),
        ({"messages": about(RED, "<|end|> now")}, "special tokens"),
    ],
)
def test_what_is_not_supported_is_refused_in_openais_shape(client, change, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence) as caught:
        client.chat.completions.create(**{"model": "nano", "messages": about(RED), **change})
    assert caught.value.type == "invalid_request_error"


def test_pictures_elsewhere_are_not_fetched(client):
    for url in ("http://127.0.0.1:9/x.png", "https://example.org/cat.jpg", "file:///etc/passwd"):
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(openai.BadRequestError, match="not fetched from other places") as caught:
            client.chat.completions.create(model="nano", messages=[{"role": "user", "content": [part]}])
        assert caught.value.code == "remote_picture"


def test_a_wrong_token_is_an_authentication_error(server):
    import httpx

    for key in ("wrong", server.token + "x", "é"):
        response = httpx.get(
            f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()}, trust_env=False
        )
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="wrong", http_client=httpx.Client(trust_env=False)
    )
    with client, pytest.raises(openai.AuthenticationError, match="give the token"):
        client.models.list()


def test_a_refusal_before_the_first_piece_of_a_stream_has_a_status(server):
    with server.client() as visitor:
        body = {"model": "nano", "messages": about(b"no picture"), "stream": True}
        response = visitor.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert events(visitor.post("/v1/chat/completions", json={**body, "messages": about(RED)}))
