"""What is said to a client in place of an answer: one sentence, a status, and OpenAI's shape of an error."""

from __future__ import annotations

from starlette.responses import JSONResponse

from microvlm.escaping import printable

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LONGEST = 600


class Refusal(Exception):
    """A request that is not answered. `code` is a word for programs, `sentence` is for people."""

    def __init__(
        self,
        status: int,
        code: str,
        sentence: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        text = printable(sentence)
        self.sentence = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 100]} … {text[-90:]}"
        super().__init__(self.sentence)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    def document(self) -> dict[str, object]:
        """The body in OpenAI's shape."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.sentence, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.document(), self.status, headers=self.headers)


def busy(code: str, sentence: str) -> Refusal:
    """A refusal that may be over in a moment: 503 with a time to wait."""
    return Refusal(503, code, sentence, headers={"Retry-After": "5"})
