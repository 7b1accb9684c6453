"""Puts the parts together: routes, the guard before them, the worker behind them, and uvicorn around them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from microvlm.errors import UserError
from microvlm.serve.connections import timed_protocol
from microvlm.serve.guard import LOOPBACK_NAMES, Guard, is_loopback
from microvlm.serve.limits import Limits
from microvlm.serve.openai_api import OpenAiApi
from microvlm.serve.own_api import OwnApi
from microvlm.serve.page import read_page
from microvlm.serve.refusal import Refusal
from microvlm.serve.service import ServedModel, Service

_SHUTDOWN_S = 3
_BACKLOG = 128


@dataclass(frozen=True)
class Address:
    """Where a server listens, and under which names."""

    host: str
    port: int
    """0 takes a free one."""
    token: str | None
    """None: everybody who reaches the address may ask."""
    names: tuple[str, ...] = ()
    """Names for which requests may be, beside the address."""


async def serve(
    models: list[ServedModel], limits: Limits, address: Address, on_ready: Callable[[int], None]
) -> None:
    """Load the models, listen, and call `on_ready` with the port. Returns when the server is stopped by a signal.

    Raises UserError for a model that cannot be loaded and for an address that cannot be used.
    """
    service = Service(models, limits)
    with bound(address.host, address.port) as listener:
        port = listener.getsockname()[1]
        try:
            await service.load()
            # On SIGINT and SIGTERM uvicorn ends what is open, and then raises the signal again.
            server = uvicorn.Server(configuration(application(service, address, port), limits))
            # Who reads the address may connect at once, and waits for the loop.
            listener.listen(_BACKLOG)
            on_ready(port)
            await server.serve([listener])
        except Refusal as refusal:
            if refusal.code == "worker_died":
                raise UserError("the process that loads the model ended: is there enough memory?") from None
            raise UserError(refusal.sentence) from None
        finally:
            await service.process.close()


def application(service: Service, address: Address, port: int) -> ASGIApp:
    """The ASGI application."""
    own = OwnApi(service, port)
    openai = OpenAiApi(service, own.cookie_session)
    content, policy = read_page()

    async def page(request: Request) -> Response:
        return Response(content, media_type="text/html", headers={"Content-Security-Policy": policy})

    routes = [Route("/", page, methods=["GET"]), *own.routes(), *openai.routes()]
    handlers = {Refusal: _refused, HTTPException: _not_here, Exception: _defect}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    names: Iterable[str] = (address.host, *address.names)
    if is_loopback(address.host):
        names = (*names, *LOOPBACK_NAMES)
    else:
        names = (*names, socket.gethostname(), f"{socket.gethostname()}.local")
    return Guard(app, service.limits, address.token, names, any_address=not is_loopback(address.host))


def configuration(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=timed_protocol(limits.receive_s),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=4 * limits.requests,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address. Raises UserError."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host} is no address of this machine ({error.strerror}).") from None
    try:
        if not _is_windows():
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError as error:
        listener.close()
        raise UserError(
            f"{host}:{port} cannot be used ({error.strerror}): give another --port, or 0 for a free one."
        ) from None
    return listener


def _is_windows() -> bool:
    # There the option would let two servers share a port.
    import os

    return os.name == "nt"


async def _refused(request: Request, error: Refusal) -> Response:
    return error.response()


async def _not_here(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        sentence = f"{request.method} is not for this address: see docs/serve.md."
        return Refusal(405, "wrong_method", sentence, headers=dict(error.headers or {})).response()
    return Refusal(404, "not_found", "there is nothing at this address: see docs/serve.md.").response()


async def _defect(request: Request, error: Exception) -> Response:
    return Refusal(
        500, "defect", "the server met a defect in its program, which its log describes."
    ).response()
