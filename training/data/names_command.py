"""`microvlm-data names`: gives the classes of a data folder their synonyms and parents."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.console import after_saving, echo, print_json
from microvlm.terminal.step_progress import waiting


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--wordnet",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of WordNet 3.0's database; Debian's package wordnet-base has /usr/share/wordnet.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def names(folder: Path, wordnet: Path, as_json: bool) -> None:
    """Write names.json into the data FOLDER: synonyms and parents of the classes that its samples name by wnid.

    microvlm-score then takes a synonym as right, and counts parents apart, without WordNet.

    \b
    Example: microvlm-data names data/mine --wordnet /usr/share/wordnet
    """
    from microvlm.training.data.class_names import add_names

    with waiting("reading the samples"):
        summary = add_names(folder, wordnet)
    with after_saving():
        if as_json:
            print_json(summary)
        else:
            echo(
                f"{summary['classes']:,} classes of {summary['samples']:,} samples: {summary['synonyms']:,} names and "
                f"{summary['parents']:,} parents in {summary['output']}"
            )
