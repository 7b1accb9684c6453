"""Options shared by the commands that run a model: the model's, those of an answer, and how they are applied."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.sources.model_source import BUNDLED, DEFAULT_MODEL
from microvlm.terminal.step_progress import waiting
from microvlm.terminal.suggestions import BACKEND, MODEL, TARGET

if TYPE_CHECKING:
    from microvlm.answers.answering import Guess
    from microvlm.backends import LoadedRuntime
    from microvlm.backends.threads import Threads
    from microvlm.inputs.processor import Processor
    from microvlm.sampling import GenerationOptions


MANY = 1_000_000
"""The largest number of tokens, rounds and the like that makes sense."""


ITS_FLOATS = "the floats of a training step depend on the number of threads"
"""Why a training command takes no --threads auto: a run that goes on elsewhere would be another one."""


class WholeNumber(click.types.IntParamType):
    """An option's whole number from `least` to `most`. Raises UserError, which names the flag."""

    def __init__(self, least: int, most: int = MANY):
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = super().convert(value, param, ctx)
        flag = param.opts[-1] if param is not None else "a number"
        if number < self.least:
            raise UserError(f"{flag} is {number}; give {self.least} or more.")
        if number > self.most:
            raise UserError(f"{flag} is {number}; give {self.most} or less.")
        return number


class ThreadCount(click.types.IntParamType):
    """A number of threads that makes sense on this machine, or "auto". Raises UserError.

    `zero` is allowed where it stands for a choice of the program's own. `never_auto` says, in a clause, why "auto" is
    refused, where it is.
    """

    def __init__(self, zero: bool = False, never_auto: str = ""):
        self.zero, self.never_auto = zero, never_auto
        self.name = "integer" if never_auto else "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from microvlm.backends.threads import AUTO, check_threads

        if value == AUTO:
            if self.never_auto:
                option = param.opts[0] if param is not None else "--threads"
                raise UserError(
                    f"{option} {AUTO} is not possible here, because {self.never_auto}; give a number."
                )
            return AUTO
        number = super().convert(value, param, ctx)
        if self.zero and number == 0:
            return number
        try:
            return check_threads(number)
        except UserError as error:
            option = param.opts[0] if param is not None else "--threads"
            raise UserError(str(error).replace("--threads", option)) from None


backend_option = click.option(
    "--backend",
    type=BACKEND,
    help="torch, ort, ort-arm64 or another installed one; by default the one that suits the model.",
)
target_option = click.option(
    "--target",
    type=TARGET,
    help="Device of ort-arm64: local, ssh:USER@HOST[:PORT] or emulated[:CPU]; by default the one that is available.",
)


show_option = click.option(
    "--show/--no-show",
    default=None,
    help="Show pictures in the terminal (kitty's or iTerm2's protocol, sixel, or blocks of 24-bit colour), or their "
    "names and sizes; by default on a terminal. They go to stderr.",
)


def model_options(command: Callable) -> Callable:
    """Add --model, --backend, --target and --threads to a command."""
    for option in (
        click.option(
            "--threads",
            type=ThreadCount(),
            help="Threads of one operator; auto measures once which number is fastest; one a core by default.",
        ),
        target_option,
        backend_option,
        click.option(
            "--model",
            type=MODEL,
            default=DEFAULT_MODEL,
            show_default=True,
            help="A checkpoint or a bundle: its folder, a hub id (owner/name) or the name of a bundled model "
            f"({', '.join(BUNDLED)}).",
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: Callable) -> Callable:
    """Add --max-new-tokens, --temperature, --top-p and --seed to a command."""
    for option in (
        click.option(
            "--seed", type=WholeNumber(0, 2**128), default=0, show_default=True, help="Seed of the sampling."
        ),
        click.option(
            "--top-p",
            default=1.0,
            show_default=True,
            help="Sample among the most probable tokens with this total.",
        ),
        click.option(
            "--temperature", default=0.0, show_default=True, help="0 takes the most probable token."
        ),
        click.option(
            "--max-new-tokens",
            type=WholeNumber(1, MANY),
            help="Longest answer; the model's default when left out.",
        ),
    ):
        command = option(command)
    return command


def confidence_options(command: Callable) -> Callable:
    """Add --min-confidence and --guesses to a command that answers."""
    for option in (
        click.option(
            "--guesses", is_flag=True, help="Also print the two likeliest answers (several times the time)."
        ),
        click.option(
            "--min-confidence",
            type=float,
            metavar="P",
            help="Decline answers of less confidence, 0 to 1; the model's own threshold when left out, 0 for none.",
        ),
    ):
        command = option(command)
    return command


def guess_lines(guesses: Sequence[Guess] | None) -> list[str]:
    """A line for each guess, with its confidence, or its probability where the model was never calibrated."""
    lines = []
    for guess in guesses or ():
        kind, value = ("confidence", guess.confidence)
        if value is None:
            kind, value = "probability", math.exp(guess.log_probability)
        lines.append(f"  {printable(guess.text)} ({kind} {value:.2f})")
    return lines


def open_model(
    model: str | os.PathLike[str], backend: str | None, threads: Threads, target: str | None = None
) -> tuple[LoadedRuntime, Processor, float]:
    """Load a model -> (runtime, processor, milliseconds). See `microvlm.load`. Raises UserError."""
    from microvlm.loaded_model import load

    start = time.perf_counter()
    with waiting(f"loading {os.fspath(model)}"):
        loaded_model = load(model, backend, threads, target)
    return loaded_model.runtime, loaded_model.processor, (time.perf_counter() - start) * 1e3


def check_sampling(
    max_new_tokens: int | None, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> None:
    """Raise UserError for values that no model accepts, before a model is loaded."""
    from microvlm.sampling import GenerationOptions

    GenerationOptions(1 if max_new_tokens is None else max_new_tokens, temperature, top_p, seed)


def generation_options(
    processor: Processor, max_new_tokens: int | None, temperature: float, top_p: float, seed: int
) -> GenerationOptions:
    """Generation options from the flags and the model's defaults. Raises UserError."""
    from microvlm.loaded_model import complete_options

    return complete_options(
        processor, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
