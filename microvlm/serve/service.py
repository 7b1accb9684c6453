"""What both interfaces offer over HTTP is done here: models by name, sessions, and jobs for the worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from starlette.responses import StreamingResponse

from microvlm.formats.documents import quote
from microvlm.serve.bodies import Bodies
from microvlm.serve.limits import Limits
from microvlm.serve.memories import Memory, Session, Sessions
from microvlm.serve.messages import Event, Job, ModelSpec, Sampling
from microvlm.serve.model_process import Exchange, ModelProcess
from microvlm.serve.refusal import Refusal

MODELS_OWN = Sampling()
Kind = Literal["ask", "tell", "forget", "evidence", "attention"]


@dataclass
class ServedModel:
    """A model on a backend."""

    id: str
    """The model's name, with `:BACKEND` behind it for all but its first backend."""
    spec: ModelSpec
    about: dict[str, Any] = field(default_factory=dict)
    """What the worker says of it."""

    def document(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.spec.name, "backend": self.spec.backend, **self.about}


@dataclass(frozen=True)
class Question:
    """What a client asks of a model, beside the model and the memory."""

    question: str = ""
    picture: bytes | None = None
    label: str = ""
    text: str = ""
    sampling: Sampling = MODELS_OWN


class Service:
    """The state of one server."""

    def __init__(self, models: list[ServedModel], limits: Limits):
        self.models = {model.id: model for model in models}
        self.default = models[0].id
        self.limits = limits
        self.sessions = Sessions(limits)
        self.bodies = Bodies(limits)
        self.process = ModelProcess(limits)

    async def load(self) -> None:
        """Load every model once, so that a bad one is reported at the start. Raises Refusal."""
        for model in self.models.values():
            exchange = self.process.submit(
                lambda with_rows, spec=model.spec: Job("load", spec),  # type: ignore[misc]
                lambda event: event,
                None,
            )
            async for event in exchange:
                model.about = event.value

    def model(self, name: str | None) -> ServedModel:
        """The model of this id, the first one without. Raises Refusal."""
        if name is None:
            return self.models[self.default]
        if name not in self.models:
            raise Refusal(
                404,
                "model_not_found",
                f"there is no model {quote(name)} here: choose one of {', '.join(self.models)}.",
                "model",
            )
        return self.models[name]

    def submit(
        self, kind: Kind, model: ServedModel, session: Session | None, question: Question, row: int = 0
    ) -> Exchange:
        """Queue a job of a session's memory, or of an empty one -> its events. Raises Refusal.

        The last event's value has `added` and `removed`, what the memory gained and lost, and `entry` as an id.
        """
        try:
            return self._submit(kind, model, session, question, row)
        except Refusal:
            if session is not None:
                self.sessions.drop_if_empty(session)
            raise

    def _submit(
        self, kind: Kind, model: ServedModel, session: Session | None, question: Question, row: int
    ) -> Exchange:
        memory = Memory(name="") if session is None else session.memory(model.spec.name)
        if kind == "tell" and memory.facts >= self.limits.facts:
            raise Refusal(
                409,
                "too_many_facts",
                f"the memory holds {memory.facts} facts, as many as it may here: forget one first.",
            )
        if session is not None and session.open_requests >= self.limits.session_waiting:
            raise Refusal(
                429,
                "too_many_of_yours",
                f"{session.open_requests} of your requests are not answered yet: wait for them.",
                headers={"Retry-After": "2"},
            )

        def make_job(with_rows: bool) -> Job:
            rows = [each.content for each in memory.rows] if with_rows else None
            return Job(
                kind,
                model.spec,
                *(memory.name, memory.revision, rows),
                question=question.question,
                text=question.text,
                label=question.label,
                picture=question.picture,
                entry=memory.index_of(row) if kind == "forget" else 0,
                sampling=question.sampling,
                pixels=self.limits.pixels,
                turns=self.limits.turns,
            )

        def on_done(event: Event) -> Event:
            entry = event.value.get("entry")
            known = None if entry is None else memory.rows[entry].id
            changes = memory.apply(event)
            if "entry" in event.value:
                changes["entry"] = known
            return msgspec.structs.replace(event, value={**event.value, **changes})

        exchange = self.process.submit(make_job, on_done, self.limits.request_s)
        if session is not None:
            session.open_requests += 1
            exchange.when_over = lambda: self._end_request(session)
        return exchange

    def _end_request(self, session: Session) -> None:
        session.open_requests -= 1
        self.sessions.drop_if_empty(session)


async def first_event(exchange: Exchange) -> Event:
    """The first event, so that what is refused at once gets a status of its own. Raises Refusal."""
    return await anext(exchange)


async def last_event(exchange: Exchange) -> Event:
    """Wait for the last event. Raises Refusal."""
    try:
        async for event in exchange:
            if event.is_last:
                return event
    finally:
        exchange.abandon()
    raise Refusal(500, "defect", "the answer is lost; ask once more.")


def event_stream(
    exchange: Exchange, first: Event, lines: Callable[[Event | Refusal], list[str]], cookies: dict[str, str]
) -> StreamingResponse:
    """Server-sent events of an exchange whose first event is known. `lines` makes the `data:` lines of an event, or of
    the refusal that ends it."""

    async def content() -> AsyncIterator[bytes]:
        try:
            for line in lines(first):
                yield _sse(line)
            async for event in exchange:
                for line in lines(event):
                    yield _sse(line)
        except Refusal as refusal:
            for line in lines(refusal):
                yield _sse(line)
        finally:
            exchange.abandon()

    return StreamingResponse(content(), media_type="text/event-stream", headers=cookies)


def _sse(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
