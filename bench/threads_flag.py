"""`--threads` of a measurement: 1 by default, and with `auto` the number that the first model answers fastest with."""

from __future__ import annotations

import os

import click

from microvlm.backends.threads import AUTO, Threads
from microvlm.commands.options import ThreadCount

threads_option = click.option(
    "--threads",
    type=ThreadCount(),
    default=1,
    show_default=True,
    help="Threads of one operator; auto takes the number that the first model answers fastest with.",
)


def number_of_threads(threads: Threads, model: str | os.PathLike[str], backend: str) -> int:
    """A number, which the whole measurement has and its document tells. Raises UserError."""
    from microvlm.backends.thread_choice import number_of

    return number_of(model, backend) if threads == AUTO else threads or 1
