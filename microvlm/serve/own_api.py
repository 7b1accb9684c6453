"""The interface of the page: ask, tell, forget, memory, and where each word of an answer looked. See docs/serve.md."""

from __future__ import annotations

import json
from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from microvlm import __version__
from microvlm.formats.documents import Count, Number
from microvlm.serve.bodies import picture_of
from microvlm.serve.memories import Session
from microvlm.serve.messages import Event, Sampling
from microvlm.serve.refusal import Refusal
from microvlm.serve.service import Question, Service, event_stream, first_event, last_event

Label = Annotated[str, Meta(max_length=200)]


class AskBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A question about a picture, or to the memory alone. An empty question asks for a caption."""

    model: str | None = None
    question: str = ""
    picture: str | None = None
    """A data URL."""
    label: Label = ""
    """Names the picture in the memory."""
    max_new_tokens: Count | None = None
    temperature: Number | None = None
    seed: Count | None = None


class TellBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A fact: what answers a question about a picture, or about none."""

    text: str
    model: str | None = None
    question: str = ""
    picture: str | None = None
    label: Label = ""


class ForgetBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The id of an entry; all of them without."""

    model: str | None = None
    entry: Count | None = None


class OwnApi:
    """Routes below /api/."""

    def __init__(self, service: Service, port: int):
        self._service = service
        self._cookie = f"microvlm_session_{port}"
        """Cookies know no port: two servers on one machine must not replace each other's."""

    def routes(self) -> list[Route]:
        return [
            Route("/api/state", self.state, methods=["GET"]),
            Route("/api/memory", self.memory, methods=["GET"]),
            Route("/api/ask", self.ask, methods=["POST"]),
            Route("/api/tell", self.tell, methods=["POST"]),
            Route("/api/forget", self.forget, methods=["POST"]),
            Route("/api/evidence", self.look, methods=["POST"]),
            Route("/api/attention", self.look, methods=["POST"]),
        ]

    def cookie_session(self, request: Request) -> Session | None:
        """The session of a request's cookie, if there is one."""
        return self._service.sessions.find(request.cookies.get(self._cookie))

    async def state(self, request: Request) -> Response:
        """The models, and what is taken at most."""
        limits = self._service.limits
        return JSONResponse(
            {
                "version": __version__,
                "models": [model.document() for model in self._service.models.values()],
                "limits": {
                    "picture_bytes": limits.picture_bytes,
                    "pixels": limits.pixels,
                    "request_s": limits.request_s,
                    "facts": limits.facts,
                },
            }
        )

    async def memory(self, request: Request) -> Response:
        """The rows of a session's memory of one model."""
        model = self._service.model(request.query_params.get("model"))
        session = self.cookie_session(request)
        rows = [] if session is None else session.memory(model.spec.name).rows
        return JSONResponse({"slots": model.about["slots"], "entries": [row.document() for row in rows]})

    async def ask(self, request: Request) -> Response:
        """Answer as a stream of events: `text`, then `done`."""
        body = await self._service.bodies.read(request, AskBody)
        limits = self._service.limits
        if body.max_new_tokens is not None and not 1 <= body.max_new_tokens <= limits.new_tokens:
            sentence = f"'max_new_tokens' is {body.max_new_tokens}: give 1 to {limits.new_tokens}."
            raise Refusal(400, "bad_request", sentence, "max_new_tokens")
        if not body.question.strip() and body.picture is None:
            raise Refusal(400, "nothing_asked", "ask a question, show a picture, or both.")
        sampling = Sampling(body.max_new_tokens, body.temperature, None, body.seed)
        picture = picture_of(body.picture, limits, "picture")
        question = Question(body.question.strip(), picture, body.label, sampling=sampling)
        model = self._service.model(body.model)
        session = self._service.sessions.find_or_begin(request.cookies.get(self._cookie))
        exchange = self._service.submit("ask", model, session, question)
        first = await first_event(exchange)
        return event_stream(exchange, first, _lines, self._set_cookie(session))

    async def tell(self, request: Request) -> Response:
        """Write a fact -> what the memory gained."""
        body = await self._service.bodies.read(request, TellBody)
        text, question = body.text.strip(), body.question.strip()
        if not text:
            raise Refusal(400, "nothing_told", "write the fact that is to be remembered.", "text")
        picture = picture_of(body.picture, self._service.limits, "picture")
        fact, model = Question(question, picture, body.label, text), self._service.model(body.model)
        session = self._service.sessions.find_or_begin(request.cookies.get(self._cookie))
        exchange = self._service.submit("tell", model, session, fact)
        event = await last_event(exchange)
        return JSONResponse(event.value, headers=self._set_cookie(session))

    async def forget(self, request: Request) -> Response:
        """Forget one entry, or all -> the ids of what is gone."""
        body = await self._service.bodies.read(request, ForgetBody)
        model, session = self._service.model(body.model), self.cookie_session(request)
        if session is None:
            raise Refusal(404, "no_such_entry", "the memory is empty: there is nothing to forget.")
        if body.entry is None:
            memory = session.memories.pop(model.spec.name, None)
            removed = [] if memory is None else [row.id for row in memory.rows]
            return JSONResponse({"added": [], "removed": removed})
        session.memory(model.spec.name).index_of(body.entry)
        exchange = self._service.submit("forget", model, session, Question(), body.entry)
        return JSONResponse((await last_event(exchange)).value)

    async def look(self, request: Request) -> Response:
        """Map each word of an answer over the picture, as a stream of events: `progress`, then `done`."""
        body = await self._service.bodies.read(request, AskBody)
        picture = picture_of(body.picture, self._service.limits, "picture")
        if picture is None:
            raise Refusal(400, "no_picture", "send the picture whose parts are to be shown.", "picture")
        kind = "evidence" if request.url.path.endswith("/evidence") else "attention"
        question = Question(body.question.strip(), picture)
        model = self._service.model(body.model)
        # The memory has no part in it; the session is counted, so that one client cannot fill the queue.
        session = self._service.sessions.find_or_begin(request.cookies.get(self._cookie))
        exchange = self._service.submit(kind, model, session, question)  # type: ignore[arg-type]
        first = await first_event(exchange)
        return event_stream(exchange, first, _lines, self._set_cookie(session))

    def _set_cookie(self, session: Session) -> dict[str, str]:
        return {"Set-Cookie": f"{self._cookie}={session.id}; Path=/; HttpOnly; SameSite=Strict"}


def _lines(event: Event | Refusal) -> list[str]:
    if isinstance(event, Refusal):
        return [json.dumps({"event": "error", **event.document()})]
    if event.kind == "text":
        return [json.dumps({"event": "text", "text": event.text})]
    return [json.dumps({"event": event.kind, **event.value})]
