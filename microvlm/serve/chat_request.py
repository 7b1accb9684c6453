"""The body of OpenAI's chat completions: what is taken of it, what is refused, and the question in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from microvlm.formats.documents import Count
from microvlm.serve.bodies import picture_of
from microvlm.serve.limits import Limits
from microvlm.serve.messages import Sampling
from microvlm.serve.refusal import Refusal
from microvlm.serve.service import Question

_MOST_MESSAGES = 1000


class ImageUrl(Struct, frozen=True):
    """A picture; `detail` is not read, because a model has one size of picture."""

    url: str


class Part(Struct, frozen=True):
    """A part of a message."""

    type: str
    text: str = ""
    image_url: ImageUrl | None = None


class ChatMessage(Struct, frozen=True):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


class StreamOptions(Struct, frozen=True):
    """`include_usage`: a last chunk has the counts of tokens."""

    include_usage: bool = False


class ChatBody(Struct, frozen=True):
    """What is read. Fields that are not here change nothing about an answer, or are in `_REFUSED`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=_MOST_MESSAGES)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Count | None = None
    n: Count | None = None
    stop: Any = None
    tools: Any = None
    functions: Any = None
    logprobs: bool | None = None
    logit_bias: Any = None
    response_format: Any = None
    audio: Any = None


_REFUSED = ("stop", "tools", "functions", "logprobs", "logit_bias", "audio")


def question_of(body: ChatBody, limits: Limits) -> Question:
    """The question: the text of the last message, about its picture or the newest one before. Raises Refusal."""
    for name in _REFUSED:
        if getattr(body, name):
            raise Refusal(400, "unsupported", f"'{name}' is not supported here: leave it out.", name)
    if body.n not in (None, 1):
        raise Refusal(400, "unsupported", "one answer is given to a request: leave 'n' out.", "n")
    if isinstance(body.response_format, dict) and body.response_format.get("type") not in (None, "text"):
        sentence = "answers are plain text: leave 'response_format' out."
        raise Refusal(400, "unsupported", sentence, "response_format")
    last = body.messages[-1]
    if last.role != "user":
        sentence = f"the last message is of the role '{last.role}': end with the user's question."
        raise Refusal(400, "no_question", sentence, "messages")
    text, picture = _text(last), None
    for message in reversed(body.messages):
        urls = _urls(message)
        if len(urls) > 1:
            sentence = f"a message has {len(urls)} pictures: ask about one at a time."
            raise Refusal(400, "too_many_pictures", sentence, "messages")
        if urls:
            picture = picture_of(urls[0], limits, "messages")
            break
    if not text and picture is None:
        raise Refusal(400, "nothing_asked", "ask a question, show a picture, or both.", "messages")
    return Question(text, picture, sampling=_sampling(body, limits))


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        return " ".join(part.text.strip() for part in message.content if part.type == "text").strip()
    return (message.content or "").strip()


def _urls(message: ChatMessage) -> list[str]:
    urls = []
    for part in message.content if isinstance(message.content, list) else ():
        if part.type == "image_url" and part.image_url is not None:
            urls.append(part.image_url.url)
        elif part.type != "text":
            sentence = f"a part of a message is 'text' or 'image_url', not '{part.type:.30}'."
            raise Refusal(400, "unsupported", sentence, "messages")
    return urls


def _sampling(body: ChatBody, limits: Limits) -> Sampling:
    given = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if given is not None and not 1 <= given <= limits.new_tokens:
        sentence = f"'max_tokens' is {given}: give 1 to {limits.new_tokens}."
        raise Refusal(400, "bad_request", sentence, "max_tokens")
    # OpenAI's default is 1; the same question has the same answer here unless a client asks for chance.
    return Sampling(given, body.temperature, body.top_p, body.seed)
