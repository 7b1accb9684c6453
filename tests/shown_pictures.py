"""Draws bench/pictures anew from the bundled weights: `python tests/shown_pictures.py`.

README.md's commands draw its pictures. One more shows photographs that no training saw with what a model calls them,
right and wrong alike. test_shown_pictures.py compares all with the committed ones.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

from page_commands import read_steps
from PIL import Image, ImageDraw, ImageFont

from microvlm.bench.photograph_reader import BenchPhotograph, read_photographs
from microvlm.commands.main import cli
from microvlm.inputs.images import load_scaled
from microvlm.loaded_model import load
from microvlm.sources.model_source import DEFAULT_MODEL
from microvlm.training.data.annotations import Annotations
from microvlm.training.scoring.naming_scores import NAMING_QUESTION, outcome

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench" / "pictures"
MODEL = DEFAULT_MODEL
"""The model that names the photographs."""
NAMES = "failures.jpg"
"""The picture that shows them, whose comment has its words."""
FLAGS = ("--evidence", "--attention")
BACKEND = ("--backend", "torch")
"""Needs no export, and gives attention weights."""
TILE, COLUMNS, MARGIN, LINE = 208, 4, 12, 20
COLOURS = {"right": "#00693e", "wrong": "#b0182b", "declined": "#5a5a5a"}
MARKS = {
    "right": ((3, 11, 8, 16), (8, 16, 17, 4)),
    "wrong": ((4, 4, 16, 16), (4, 16, 16, 4)),
    "declined": ((3, 10, 17, 10),),
}
"""Strokes in a square of 20 pixels: a tick, a cross and a dash, which need no colour and no font."""


class Named(NamedTuple):
    """A photograph and what a model calls it."""

    photograph: BenchPhotograph
    answer: str
    judgement: str
    """A key of COLOURS."""


def commands() -> dict[str, list[str]]:
    """Name of a picture -> the arguments of README.md's command that draws it. Raises ValueError for two of a name."""
    found: dict[str, list[str]] = {}
    for step in read_steps(ROOT / "README.md"):
        program, *arguments = shlex.split(step.command)
        if program == "microvlm":
            for flag in set(FLAGS) & set(arguments):
                name = arguments[arguments.index(flag) + 1]
                if name in found:
                    raise ValueError(f"README.md draws {name} twice")
                found[name] = arguments
    return found


def draw_of_command(name: str, folder: Path) -> Path:
    """Run README.md's command that draws `name`, into a folder."""
    target = (folder / name).resolve()
    arguments = [str(target) if argument == name else argument for argument in commands()[name]]
    with chdir(ROOT):
        status = cli.main([*arguments, *BACKEND], standalone_mode=False)
    assert not status, arguments
    return target


def name_photographs(model: str = MODEL) -> list[Named]:
    """What a model answers to "what is this?" about the photographs of the benchmark."""
    photographs = read_photographs()
    loaded = load(model, "torch")
    answers = [loaded.generate(photograph.path, NAMING_QUESTION) for photograph in photographs]
    return [Named(*pair, judge(*pair)) for pair in zip(photographs, answers, strict=True)]


def judge(photograph: BenchPhotograph, answer: str) -> str:
    """right, wrong or declined."""
    what = outcome(answer, Annotations(label=photograph.shows, synonyms=photograph.also))
    return {"label": "right", "synonym": "right"}.get(what, what)


def words_of(named: list[Named]) -> str:
    """A line for each photograph: its file, the answer, and whether that is right."""
    return "\n".join(f"{each.photograph.file}: {each.answer} ({each.judgement})" for each in named)


def place_of(number: int) -> tuple[int, int]:
    """Left and top of a photograph's tile."""
    row, column = divmod(number, COLUMNS)
    return MARGIN + column * (TILE + MARGIN), 2 * MARGIN + LINE + row * (TILE + 2 * LINE + 2 * MARGIN)


def draw_names(named: list[Named], model: str) -> Image.Image:
    """A tile for each photograph, in its own shape; under it a mark with the answer, the verdict and the right name."""
    counts = {word: sum(each.judgement == word for each in named) for word in COLOURS}
    head = f'{model}, asked "{NAMING_QUESTION}": ' + ", ".join(
        f"{count} {word}" for word, count in counts.items()
    )
    bottom = place_of(len(named) - 1)[1] + TILE + 2 * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (MARGIN + COLUMNS * (TILE + MARGIN), bottom), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    pen.text((MARGIN, MARGIN), head, "black", font)
    for number, each in enumerate(named):
        left, top = place_of(number)
        picture = load_scaled(each.photograph.path, TILE)
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        below, colour = top + TILE + 4, COLOURS[each.judgement]
        for stroke in MARKS[each.judgement]:
            pen.line([along + (left, below)[index % 2] for index, along in enumerate(stroke)], colour, 4)
        pen.text((left + 24, below), fitted(each.answer, font), colour, font)
        told = (
            each.judgement
            if each.judgement == "right"
            else f"{each.judgement}, it is: {each.photograph.shows}"
        )
        pen.text((left + 24, below + LINE), fitted(told, font), "black", font)
    return sheet


def fitted(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut to the width of a tile beside its mark."""
    end = ""
    while text and font.getlength(text + end) > TILE - 24:
        text, end = text[:-1], "…"
    return text + end


def write_names(folder: Path, model: str = MODEL) -> Path:
    """Draw the sheet of photographs into a folder."""
    named = name_photographs(model)
    draw_names(named, model).save(folder / NAMES, quality=88, comment=words_of(named).encode())
    return folder / NAMES


def main() -> None:
    paths = [draw_of_command(name, FOLDER) for name in commands()]
    for path in (*paths, write_names(FOLDER)):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
