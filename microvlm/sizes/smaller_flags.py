"""Flags of an export that choose widths and sizes, shared by the command that exports and the one that predicts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from microvlm.errors import UserError
from microvlm.formats.weight_format import WeightFormat
from microvlm.sizes.smaller import Smaller


def smaller_options(command: Callable) -> Callable:
    """Add --layers, --slots, --vocabulary, --corpus and --language to a command, which gets them as `smaller`."""

    @functools.wraps(command)
    def with_smaller(
        *,
        layers: int | None,
        slots: int | None,
        vocabulary: int | None,
        corpus: Path | None,
        languages: tuple[str, ...],
        **options: Any,
    ) -> Any:
        smaller = Smaller(layers, slots, vocabulary, corpus, languages)
        smaller.require_sense()
        return command(smaller=smaller, **options)

    decorated: Callable = with_smaller
    for option in (
        click.option(
            "--language",
            "languages",
            multiple=True,
            metavar="CODE",
            help="Keep tokens of this language's script (en, de, ja, ...); may be repeated.",
        ),
        click.option(
            "--corpus",
            type=click.Path(path_type=Path),
            help="With --vocabulary: keep the tokens that these texts (.txt, .jsonl, .jsonl.gz) use most.",
        ),
        click.option(
            "--vocabulary",
            type=int,
            metavar="N",
            help="Keep at most this many tokens: bytes, the first merges, what the prompt needs. All by default.",
        ),
        click.option("--slots", type=int, metavar="N", help="Keep this many slots of the memory."),
        click.option(
            "--layers",
            type=int,
            metavar="N",
            help="Keep this many decoder layers, those that measuring finds to matter most.",
        ),
    ):
        decorated = option(decorated)
    return decorated


def read_weight_format(bits: str, packing: str, embedding_bits: str) -> WeightFormat:
    """The format that --bits, --packing and --embedding-bits say. Raises UserError, which names the choices."""
    try:
        width = float(bits)
    except ValueError:
        raise UserError(f"--bits {bits} is not a number; choose one of 32, 16, 8, 4, 1.58.") from None
    try:
        table_width: Any = int(embedding_bits)
    except ValueError:
        raise UserError(f"--embedding-bits {embedding_bits} is not offered; choose 16, 8 or 4.") from None
    weights = WeightFormat(width, packing, table_width)
    if weights.embedding_bits == 32:
        raise UserError("--embedding-bits 32 is not offered; choose 16, 8 or 4.")
    return weights
