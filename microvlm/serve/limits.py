"""What a server takes at most. Every limit that is reached is refused in one sentence with a fitting status."""

from __future__ import annotations

from dataclasses import dataclass, fields

from microvlm.errors import UserError

MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Limits of one server. Raises UserError for a value below 1."""

    picture_bytes: int = 12 * MB
    """Of one picture's file: 413."""
    pixels: int = 50 * MB
    """Width times height of one picture: 413. What is held while it is decoded has its own limit."""
    text_bytes: int = 1 * MB
    """Of a request, beside its picture: 413."""
    waiting: int = 16
    """Requests that wait for the model: 503."""
    session_waiting: int = 3
    """Requests of one session that wait for the model or are answered: 429."""
    sessions: int = 32
    """Conversations that are kept at the same time: 503."""
    idle_s: float = 1800.0
    """A conversation without a request for so long is dropped."""
    facts: int = 200
    """Facts that one session has told one model: 409."""
    turns: int = 200
    """Answers of one session that one model remembers; the oldest is forgotten for the next."""
    request_s: float = 60.0
    """Longest time of an answer: 504. A request waits for its turn no longer than that either: 503."""
    receive_s: float = 20.0
    """Until a request's body has come: 408. Until its headers have come, the connection is closed without a word."""
    requests: int = 64
    """Requests that are open at the same time: 503."""
    received_bytes: int = 8 * 16 * MB
    """Bodies that are held at the same time: 503."""
    new_tokens: int = 1024
    """Tokens of one answer: 400."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 1:
                raise UserError(f"the limit '{field.name}' is {getattr(self, field.name):g}; give 1 or more.")

    @property
    def body_bytes(self) -> int:
        """The largest body: a picture in base64 and the text beside it."""
        return self.picture_bytes * 4 // 3 + self.text_bytes
