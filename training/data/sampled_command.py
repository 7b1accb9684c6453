"""`microvlm-data sampled`: texts that a model writes by itself, to distil it without a text."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.console import after_saving, echo, print_json
from microvlm.errors import UserError
from microvlm.terminal.step_progress import step
from microvlm.terminal.suggestions import BACKEND, MODEL


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="A .jsonl file to write."
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 1_000_000_000),
    default=100_000,
    show_default=True,
    help="Tokens in all.",
)
@click.option("--length", type=int, default=96, show_default=True, help="Tokens of a text.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the sampling.")
@click.option(
    "--backend", type=BACKEND, default="torch", show_default=True, help="Backend that runs the model."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def sampled(
    model: str, output: Path, tokens: int, length: int, seed: int, backend: str, as_json: bool
) -> None:
    """Let MODEL write texts, which `microvlm-train distill-texts` takes as its data.

    \b
    Example: microvlm-data sampled start --tokens 200000 -o sampled.jsonl
    """
    if not output.name.endswith(".jsonl"):
        raise UserError(f"{output} is no name of JSON lines: give one that ends in .jsonl.")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}: make it first.")
    from microvlm.loaded_model import load
    from microvlm.training.data.sampled_texts import write_sampled

    def progress(done: int, total: int) -> None:
        step(f"{done:,} of {total:,} texts")

    count = write_sampled(load(model, backend), output, tokens, length, seed, progress)
    with after_saving():
        if as_json:
            print_json({"output": str(output), "texts": count})
        else:
            echo(f"{output}: {count:,} texts of {length} tokens")
