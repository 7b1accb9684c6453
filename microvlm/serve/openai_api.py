"""OpenAI's interface: POST /v1/chat/completions, also as a stream, and GET /v1/models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from microvlm.serve.chat_request import ChatBody, question_of
from microvlm.serve.memories import Session
from microvlm.serve.messages import Event
from microvlm.serve.refusal import Refusal
from microvlm.serve.service import ServedModel, Service, event_stream, first_event, last_event

_DONE = "[DONE]"
_OWN = ("source", "confidence", "declined")
"""What a choice has beyond OpenAI's fields, in `microvlm`."""


class OpenAiApi:
    """Routes below /v1/."""

    def __init__(self, service: Service, cookie_session: Callable[[Request], Session | None]):
        """`cookie_session`: a client that sends the cookie of a session asks with its memory; no other has one."""
        self._service = service
        self._cookie_session = cookie_session
        self._started = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{id:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        models = [self._document(model) for model in self._service.models.values()]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._document(self._service.model(request.path_params["id"])))

    async def complete(self, request: Request) -> Response:
        """Answer the last message. See `question_of` for what is read of the others."""
        body = await self._service.bodies.read(request, ChatBody)
        model = self._service.model(body.model)
        question = question_of(body, self._service.limits)
        exchange = self._service.submit("ask", model, self._cookie_session(request), question)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.id}
        if not body.stream:
            return JSONResponse(_completion(head, (await last_event(exchange)).value))
        first = await first_event(exchange)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = _Chunks(head, with_usage)
        return event_stream(exchange, first, chunks.lines, {})

    def _document(self, model: ServedModel) -> dict[str, Any]:
        return {"id": model.id, "object": "model", "created": self._started, "owned_by": "microvlm"}


class _Chunks:
    """The chunks of one streamed answer."""

    def __init__(self, head: dict[str, Any], with_usage: bool):
        self._head, self._with_usage = head, with_usage
        self._has_begun = False

    def lines(self, event: Event | Refusal) -> list[str]:
        if isinstance(event, Refusal):
            return [json.dumps(event.document()), _DONE]
        if event.kind == "text":
            delta = {"content": event.text}
            if not self._has_begun:
                delta = {"role": "assistant", **delta}
            self._has_begun = True
            return [self._chunk(delta)]
        if not event.is_last:
            return []
        lines = [] if self._has_begun else [self._chunk({"role": "assistant", "content": ""})]
        lines.append(self._chunk({}, event.value["finish"], _own(event.value)))
        if self._with_usage:
            usage = {"choices": [], "usage": _usage(event.value)}
            lines.append(json.dumps({**self._head, "object": "chat.completion.chunk", **usage}))
        return [*lines, _DONE]

    def _chunk(
        self, delta: dict[str, str], finish: str | None = None, own: dict[str, Any] | None = None
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = None
        return json.dumps(chunk if own is None else {**chunk, "microvlm": own})


def _completion(head: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": value["answer"], "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": value["finish"]}
    return {
        **head,
        "object": "chat.completion",
        "choices": [choice],
        "usage": _usage(value),
        "microvlm": _own(value),
    }


def _own(value: dict[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in _OWN}


def _usage(value: dict[str, Any]) -> dict[str, int]:
    prompt, completion = value["prompt_tokens"], value["completion_tokens"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
