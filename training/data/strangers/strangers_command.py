"""`microvlm-data strangers`: draws pictures without a thing in them, as a source of records that decline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from microvlm.console import after_saving, echo, print_json
from microvlm.terminal.step_progress import counted

KIND_NAMES = ("noise", "stripes", "blocks", "gradients", "textures")
RECORDS = "captions.jsonl"


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--count", type=click.IntRange(1, 1_000_000), default=500, show_default=True, help="Pictures in all."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the drawings.")
@click.option("--side", type=click.IntRange(16, 1024), default=224, show_default=True, help="Pixels a side.")
@click.option(
    "--kind", "kinds", type=click.Choice(KIND_NAMES), multiple=True, help="Draw only these; all by default."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def strangers(output: Path, count: int, seed: int, side: int, kinds: tuple[str, ...], as_json: bool) -> None:
    """Draw noise, stripes, blocks, gradients and textures, which a model should decline.

    The folder is a SOURCE of `microvlm-data images`. The same seed draws the same pictures.

    \b
    Example: microvlm-data strangers -o strangers --count 200
    """
    written = write_strangers(output, count, seed, side, kinds or KIND_NAMES, counted("pictures drawn"))
    with after_saving():
        if as_json:
            print_json({"output": str(output), "written": written})
            return
        for kind, number in written.items():
            echo(f"{kind:24s}{number:6d} pictures")
        echo(f"Next: microvlm-data images {output / RECORDS} -o DATA")


def write_strangers(
    output: Path,
    count: int,
    seed: int,
    side: int,
    kinds: tuple[str, ...] = KIND_NAMES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write `count` pictures, by turns of the kinds, and their records -> pictures by kind.

    Picture number n of a seed is the same whatever the count. `progress` is called with the number of
    drawn pictures and `count`. Raises UserError for a folder that has other content.
    """
    import numpy as np

    from microvlm.atomic import os_errors_about, write_file
    from microvlm.errors import UserError
    from microvlm.training.data.strangers.patterns import as_image, draw

    with os_errors_about(output):
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"{output} is not empty; give a new folder with -o.")
        output.mkdir(parents=True, exist_ok=True)
        lines = []
        written = dict.fromkeys(kinds, 0)
        for number in range(count):
            kind = kinds[number % len(kinds)]
            name = f"{kind}-{number:06d}.png"
            pixels = draw(kind, np.random.default_rng([seed, number]), side)
            as_image(pixels).save(output / name, format="PNG")
            lines.append(json.dumps({"image": name, "declines": kind}) + "\n")
            written[kind] += 1
            progress(number + 1, count)
    write_file(output / RECORDS, "".join(lines))  # last: a folder that was cut off is no source
    return written
