"""The pages on training: stages are those of the recipe, commands are accepted, members of the data exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from microvlm.bench import bench_command
from microvlm.commands.main import cli
from microvlm.exporters import export_command
from microvlm.training import train_command
from microvlm.training.data import data_command
from microvlm.training.emoji.data.emoji import EmojiData
from microvlm.training.recipe import load_recipe
from microvlm.training.scoring import score_command

DOCS = Path(__file__).parent.parent / "docs"
PAGE = "".join((DOCS / name).read_text() for name in ("training-nano.md", "training.md", "distilling.md"))
PHOTO_PAGE = (DOCS / "training-photo.md").read_text()
SMALL_PAGE = (DOCS / "training-small.md").read_text()
PROGRAMS = {
    "microvlm": cli,
    "microvlm-data": data_command.command,
    "microvlm-train": train_command.whole_command(),
    "microvlm-score": score_command.command,
    "microvlm-export": export_command.command,
    "microvlm-bench": bench_command.command,
}


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE + PHOTO_PAGE + SMALL_PAGE, re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("microvlm")]


def test_the_table_of_stages_is_the_recipe():
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \| (\d+) \|", PAGE, re.M)
    recipe = load_recipe("nano")
    assert rows == [(stage.name, stage.task, str(stage.steps)) for stage in recipe.stages]


def test_the_stages_of_photo_are_the_recipes():
    rows = re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \|", PHOTO_PAGE, re.M)
    names = ("photo", "photo-further", "photo-facts", "photo-colours", "photo-words")
    recipes = [load_recipe(name) for name in names]
    assert rows == [(stage.name, stage.task) for recipe in recipes for stage in recipe.stages]


def test_the_stages_of_small_are_the_recipe():
    rows = re.findall(r"^\| `([\w-]+)` \| [a-z].* \| ([\w-]+)(?:, layers [\w-]+)? \|$", SMALL_PAGE, re.M)
    assert [(name, float(rate)) for name, rate in rows] == [
        (stage.name, stage.learning_rate) for stage in load_recipe("small").stages
    ]


@pytest.mark.parametrize("line", commands())
def test_every_command_is_accepted_by_its_program(line):
    """Parsed with all their options and not run, which takes hours."""
    program, *arguments = shlex.split(line.partition(" > ")[0])
    command = PROGRAMS[program]
    context = command.make_context(program, list(arguments))
    if isinstance(command, click.Group):
        name, subcommand, rest = command.resolve_command(context, arguments)
        context = subcommand.make_context(name, rest)
    stage = context.params.get("start_stage")
    assert stage is None or stage in [stage.name for stage in load_recipe("nano").stages]


def test_every_member_of_the_boundary_exists():
    table = PAGE.partition("## The boundary to the data")[2].partition("\nAnother kind")[0]
    names = re.findall(r"`(\w+)(?:\(\w+\))?`(?=[^|\n]*\|[^|\n]*\|$)", table, re.M)
    members = {*EmojiData.__dataclass_fields__, *vars(EmojiData)}
    assert {"captions", "images", "folder"} <= set(names)
    assert set(names) - {"member"} <= members
