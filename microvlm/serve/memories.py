"""Conversations as the server keeps them, with a memory per model: rows of bytes, and what a page shows of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from microvlm.serve.limits import Limits
from microvlm.serve.messages import Event
from microvlm.serve.refusal import Refusal, busy


@dataclass
class Row:
    """A row of a memory. Its id stays when others are forgotten."""

    id: int
    content: bytes
    view: dict[str, Any]

    def document(self) -> dict[str, Any]:
        return {"id": self.id, **self.view}


@dataclass
class Memory:
    """What one session has told one model, and what that model said."""

    name: str = field(default_factory=lambda: secrets.token_hex(16))
    """By which the worker knows it; it is no secret of the session's."""
    rows: list[Row] = field(default_factory=list)
    revision: int = 0
    next_id: int = 1

    def apply(self, event: Event) -> dict[str, Any]:
        """Take over what a job changed -> `added` (documents) and `removed` (ids)."""
        removed = {self.rows[index].id for index in event.removed}
        added = [Row(self.next_id + number, new.content, new.view) for number, new in enumerate(event.added)]
        self.next_id += len(added)
        self.rows = [row for row in self.rows if row.id not in removed] + added
        self.revision += bool(removed or added)
        return {"added": [row.document() for row in added], "removed": sorted(removed)}

    def index_of(self, number: int) -> int:
        """Index of the row with an id. Raises Refusal."""
        for index, row in enumerate(self.rows):
            if row.id == number:
                return index
        raise Refusal(404, "no_such_entry", f"the memory has no entry {number}: it may be forgotten already.")

    @property
    def facts(self) -> int:
        return sum(bool(row.view.get("told")) for row in self.rows)


@dataclass
class Session:
    """One conversation."""

    id: str
    used: float
    memories: dict[str, Memory] = field(default_factory=dict)
    """By the model's name: backends of one model share it."""
    open_requests: int = 0

    def memory(self, model: str) -> Memory:
        return self.memories.setdefault(model, Memory())


class Sessions:
    """The conversations of a server, no more than `limits.sessions`; idle ones are dropped."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._limits, self._clock = limits, clock
        self._sessions: dict[str, Session] = {}

    def find(self, cookie: str | None) -> Session | None:
        """The session that a cookie names, which is then in use; None for another cookie."""
        self._drop_idle()
        session = self._sessions.get(cookie or "")
        if session is not None:
            session.used = self._clock()
        return session

    def find_or_begin(self, cookie: str | None) -> Session:
        """The session of a cookie, or a new one under a random id. Raises Refusal where there are too many."""
        session = self.find(cookie)
        if session is None:
            if len(self._sessions) >= self._limits.sessions:
                raise busy(
                    "too_many_sessions",
                    f"the server holds {len(self._sessions)} conversations, as many as it may; try again later.",
                )
            session = Session(secrets.token_urlsafe(32), self._clock())
            self._sessions[session.id] = session
        return session

    def drop_if_empty(self, session: Session) -> None:
        """Forget a session that remembers nothing and waits for nothing: refused requests leave none behind."""
        if not session.open_requests and not any(memory.rows for memory in session.memories.values()):
            self._sessions.pop(session.id, None)

    def __len__(self) -> int:
        return len(self._sessions)

    def _drop_idle(self) -> None:
        oldest = self._clock() - self._limits.idle_s
        for session in list(self._sessions.values()):
            if session.used < oldest and not session.open_requests:
                del self._sessions[session.id]
