"""Decides before anything else whether a request is one for this server, and adds the headers that protect a page.

Checks the Host header (DNS rebinding), the Origin of requests that change something, the bearer token, and how many
requests are open. Reads no body.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from microvlm.serve.limits import Limits
from microvlm.serve.refusal import Refusal, busy

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_SAFE_METHODS = ("GET", "HEAD")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_NO_CONTENT = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """ASGI middleware in front of all routes."""

    def __init__(
        self, app: ASGIApp, limits: Limits, token: str | None, names: Iterable[str], any_address: bool
    ):
        """`names`: host names that requests may be for. `any_address`: any IP address is one too; a name that somebody
        points at this machine is not an address."""
        self._app, self._limits = app, limits
        self._token = None if token is None else token.encode()
        self._names = {name.lower().rstrip(".") for name in names}
        self._any_address = any_address
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _with_headers(send)
        if self._open >= self._limits.requests:
            refusal = busy("too_many_requests", f"{self._open} requests are open, as many as may: try again.")
            await refusal.response()(scope, receive, send)
            return
        self._open += 1
        try:
            self._check(scope)
            await self._app(scope, receive, send)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
        finally:
            self._open -= 1

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host_name(host)):
            sentence = (
                "this server answers under its own name only: --allow-host lets it answer under another."
            )
            raise Refusal(421, "wrong_host", sentence)
        origin = headers.get("origin")
        if scope["method"] not in _SAFE_METHODS and (
            (origin is not None and origin.partition("://")[2].lower() != host.lower())
            or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
        ):
            raise Refusal(403, "other_origin", "a page of another site asked for this, which is not allowed.")
        if self._token is not None and scope["path"].startswith(("/api/", "/v1/")):
            kind, _, given = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)
            if kind.lower() != "bearer" or not is_right:
                raise Refusal(
                    401,
                    "wrong_token",
                    "give the token that the server was started with, as 'Authorization: Bearer TOKEN'.",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _is_ours(self, name: str) -> bool:
        return name in self._names or (self._any_address and is_address(name))


def host_name(host: str) -> str:
    """The name of a Host header, without its port and without the brackets of IPv6."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on `host`."""
    if host.lower() == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _with_headers(send: Send) -> Send:
    async def send_guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Content-Security-Policy", _NO_CONTENT)
        await send(message)

    return send_guarded
