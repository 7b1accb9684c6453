"""What the commands that run a model share: its flags, opening it, the flags of an answer. Needs no torch itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from microvlm.backends import LoadedRuntime
    from microvlm.generation import GenerationOptions
    from microvlm.inputs.processor import Processor


backend_option = click.option(
    "--backend", help="torch, ort, ort-arm64 or another installed one; by default what suits the model."
)
target_option = click.option(
    "--target",
    metavar="WHERE",
    help="Of ort-arm64: local, ssh:USER@HOST[:PORT] or emulated[:CPU]; by default what is there.",
)


def model_options(command: Callable) -> Callable:
    """--model, --backend, --target and --threads."""
    for option in (
        click.option("--threads", type=int, help="Threads of one operator; the backend's choice by default."),
        target_option,
        backend_option,
        click.option(
            "--model",
            default="nano",
            show_default=True,
            help="A checkpoint or a bundle: folder, hub id or name.",
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: Callable) -> Callable:
    """--max-new-tokens, --temperature, --top-p and --seed."""
    for option in (
        click.option("--seed", default=0, show_default=True, help="Of the sampling."),
        click.option(
            "--top-p", default=1.0, show_default=True, help="Sample among the likeliest of this probability."
        ),
        click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token."),
        click.option("--max-new-tokens", type=int, help="Longest answer; the model's default when left out."),
    ):
        command = option(command)
    return command


def default_backend(model: str) -> str:
    """`ort` for a bundle; for a checkpoint `torch`, which needs no export, unless it is not installed."""
    from microvlm.backends import get_backend
    from microvlm.backends.resolve import is_bundle

    return "torch" if not is_bundle(model) and get_backend("torch").unavailable() is None else "ort"


def open_model(
    model: str, backend: str | None, threads: int | None, target: str | None = None
) -> tuple[LoadedRuntime, Processor, float]:
    """(runtime, processor, milliseconds it took). A `target` alone means `ort-arm64`. Raises UserError."""
    from microvlm.backends import load
    from microvlm.inputs.processor import Processor

    start = time.perf_counter()
    options = {} if target is None else {"target": target}
    chosen = backend or ("ort-arm64" if target is not None else default_backend(model))
    runtime = load(chosen, model, threads, **options)
    processor = Processor.from_pretrained(runtime.directory)
    return runtime, processor, (time.perf_counter() - start) * 1e3


def check_sampling(
    max_new_tokens: int | None, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> None:
    """Raises UserError for flags that no model takes, before one is opened."""
    from microvlm.generation import GenerationOptions

    GenerationOptions(1 if max_new_tokens is None else max_new_tokens, temperature, top_p, seed)


def generation_options(
    processor: Processor, max_new_tokens: int | None, temperature: float, top_p: float, seed: int
) -> GenerationOptions:
    """The flags over the model's defaults. Raises UserError."""
    from microvlm.generation import GenerationOptions

    length = processor.max_new_tokens if max_new_tokens is None else max_new_tokens
    return GenerationOptions(length, temperature, top_p, seed, processor.stop_tokens)
