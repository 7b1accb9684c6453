"""`microvlm serve`: a page to try models in a browser, and an OpenAI-compatible interface."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from microvlm.commands.options import ThreadCount, WholeNumber
from microvlm.console import echo, note
from microvlm.errors import UserError
from microvlm.sources.model_source import BUNDLED, DEFAULT_MODEL
from microvlm.terminal.suggestions import BACKEND, MODEL

if TYPE_CHECKING:
    from microvlm.backends.threads import Threads
    from microvlm.serve.service import ServedModel

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
_EVERY_ADDRESS = ("0.0.0.0", "::", "")
SHORTEST_TOKEN = 16
TOKEN_VARIABLE = "MICROVLM_TOKEN"
_EXAMPLE = """\b
Example:
  microvlm serve photo nano --backend ort
then open http://127.0.0.1:8000 in a browser, or give http://127.0.0.1:8000/v1
to any client of OpenAI's chat completions. Ctrl-C stops it."""


@click.command(epilog=_EXAMPLE)
@click.argument("models", type=MODEL, nargs=-1, metavar="[MODEL]...")
@click.option(
    "--backend",
    "backends",
    type=BACKEND,
    multiple=True,
    help="torch, ort or another installed one; may be given more than once. By default the one that suits the model.",
)
@click.option(
    "--threads",
    type=ThreadCount(),
    help="Threads of one operator; auto measures once which number is fastest; one a core by default.",
)
@click.option(
    "--host",
    default=DEFAULT_HOST,
    show_default=True,
    help="Address to listen on. Any but this machine's own (127.0.0.1, ::1) needs a token.",
)
@click.option(
    "--port", type=WholeNumber(0, 65535), default=DEFAULT_PORT, show_default=True, help="0 takes a free one."
)
@click.option(
    "--token",
    envvar=TOKEN_VARIABLE,
    help=f"What clients must send as bearer token; made and printed where --host needs one. Or set {TOKEN_VARIABLE}.",
)
@click.option(
    "--allow-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="A host name under which the server is reached, beside its address; may be given more than once.",
)
@click.option(
    "--request-seconds",
    type=WholeNumber(1, 86_400),
    default=60,
    show_default=True,
    help="Longest time of one answer, and of the wait for its turn.",
)
@click.option(
    "--picture-mb",
    type=WholeNumber(1, 100),
    default=12,
    show_default=True,
    help="Largest picture file, in MB.",
)
@click.option(
    "--megapixels",
    type=WholeNumber(1, 1000),
    default=50,
    show_default=True,
    help="Largest picture, in pixels.",
)
@click.option(
    "--queue",
    type=WholeNumber(1, 10_000),
    default=16,
    show_default=True,
    help="Most requests that wait for the model.",
)
@click.option(
    "--sessions",
    type=WholeNumber(1, 10_000),
    default=32,
    show_default=True,
    help="Most conversations at a time; one that is idle for half an hour is dropped.",
)
def serve(
    models: tuple[str, ...],
    backends: tuple[str, ...],
    threads: Threads,
    host: str,
    port: int,
    token: str | None,
    names: tuple[str, ...],
    request_seconds: int,
    picture_mb: int,
    megapixels: int,
    queue: int,
    sessions: int,
) -> None:
    """Serve each MODEL, a checkpoint or a bundle, to browsers and to clients of OpenAI's interface.

    A page shows what a model sees, says and remembers. Every visitor has a memory of their own, which ends with the
    visit. Nothing leaves this machine, and only this machine is answered unless --host says otherwise.
    """
    import asyncio

    from microvlm.serve.guard import is_loopback
    from microvlm.serve.limits import MB, Limits
    from microvlm.serve.server import Address
    from microvlm.serve.server import serve as serve_models

    served = served_models(models or (DEFAULT_MODEL,), backends, threads)
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(
            f"--token must have at least {SHORTEST_TOKEN} printable ASCII characters: "
            "leave it out to get one that nobody can guess."
        )
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    limits = Limits(
        picture_bytes=picture_mb * MB,
        pixels=megapixels * MB,
        waiting=queue,
        sessions=sessions,
        request_s=float(request_seconds),
    )

    def tell(port: int) -> None:
        name = socket.gethostname() if host in _EVERY_ADDRESS else host
        shown = f"[{name}]" if ":" in name else name
        ending = "" if token is None else f"/#token={token}"
        echo(f"http://{shown}:{port}{ending}")
        note(f"serving {', '.join(model.id for model in served)}; Ctrl-C stops it")

    try:
        asyncio.run(serve_models(served, limits, Address(host, port, token, names), tell))
    except KeyboardInterrupt:
        note("stopped")


def served_models(sources: tuple[str, ...], backends: tuple[str, ...], threads: Threads) -> list[ServedModel]:
    """Every model on every backend, the first one first. Raises UserError for what cannot run here."""
    from microvlm.backends import get_backend
    from microvlm.loaded_model import default_backend
    from microvlm.serve.messages import ModelSpec
    from microvlm.serve.service import ServedModel

    for name in backends:
        reason = get_backend(name).unavailable()
        if reason is not None:
            raise UserError(f"backend '{name}' cannot run here: {reason}")
    served: list[ServedModel] = []
    for source in dict.fromkeys(sources):
        name = source if source in BUNDLED else Path(source).name or source
        if any(model.spec.name == name for model in served):
            raise UserError(f"two models are called '{name}': rename the folder of one of them.")
        for number, backend in enumerate(dict.fromkeys(backends or (default_backend(source),))):
            id = name if number == 0 else f"{name}:{backend}"
            served.append(ServedModel(id, ModelSpec(name, source, backend, threads)))
    return served
