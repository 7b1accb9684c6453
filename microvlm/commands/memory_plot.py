"""`microvlm memory plot`: a picture of what a memory file holds. Imports no numpy until it draws."""

from __future__ import annotations

from pathlib import Path

import click

from microvlm.commands.options import show_option
from microvlm.console import after_saving, echo, print_json
from microvlm.errors import UserError
from microvlm.terminal.pictures import open_pictures
from microvlm.terminal.suggestions import FILE


@click.command()
@click.argument("file", type=FILE, metavar="FILE")
@click.option("-o", "--output", type=FILE, required=True, metavar="PICTURE.png", help="The picture's file.")
@click.option(
    "--memory", "number", type=int, help="Which memory of a file with several; the last if left out."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@show_option
def plot(file: str, output: str, number: int | None, as_json: bool, show: bool | None) -> None:
    """Draw the facts in FILE over the memory's slots: addressing, use, variance, and which facts look alike.

    \b
    Example: microvlm memory plot facts.mem -o facts.png
    """
    from microvlm.atomic import new_file
    from microvlm.commands.memory_picture import document_of, draw_state, numbers_of, sentence_of
    from microvlm.memory.memory_file import read_memory

    pictures = open_pictures(False if show is None and as_json else show)
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {output} is not a .png; give a file name that ends in .png.")
    if path.exists() and Path(file).exists() and path.samefile(file):
        raise UserError(f"--output {output} would replace the memory itself; give another name.")
    memory, _ = read_memory(file)
    number = memory.state_count if number is None else number
    if not 1 <= number <= memory.state_count:
        raise UserError(
            f"--memory is {number} and {file} has {memory.state_count}: give 1 to {memory.state_count}."
        )
    state = numbers_of(memory, number - 1)
    if not state.numbers:
        raise UserError(f"{file} holds no facts: write one with 'microvlm memory write' first.")
    with new_file(path) as temporary:
        draw_state(state).save(temporary, format="PNG")
    if pictures is not None:
        pictures.show(path, is_sheet=True)
    with after_saving():
        if as_json:
            print_json(document_of(state, number, output))
        else:
            echo(sentence_of(state))
