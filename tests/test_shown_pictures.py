"""The pictures that the pages show are what the bundled weights draw and say now."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import shown_pictures
from PIL import Image
from shown_pictures import COLOURS, FOLDER, MARGIN, NAMES, ROOT, TILE

from microvlm.bench.photograph_reader import read_photographs
from microvlm.commands.heatmap import PANEL_PX, WORDS

REMEDY = "draw the pictures again: python tests/shown_pictures.py"
NUMBER = re.compile(r"(\d+\.\d+)")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def said(path: Path) -> tuple[list[str], list[float]]:
    """The words of a drawn PNG, and the numbers between them."""
    with Image.open(path) as image:
        parts = NUMBER.split(image.text[WORDS])
    return parts[::2], list(map(float, parts[1::2]))


def pixels(path: Path, width: int, height: int) -> np.ndarray:
    """The upper left part of a picture, int64 [height, width, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)[:height, :width]


@pytest.mark.parametrize("name", shown_pictures.commands())
def test_a_picture_of_the_readme_is_what_its_command_draws_and_says(name, tmp_path):
    drawn, committed = shown_pictures.draw_of_command(name, tmp_path), FOLDER / name
    (words, numbers), (committed_words, committed_numbers) = said(drawn), said(committed)
    assert committed_words == words, REMEDY
    assert committed_numbers == pytest.approx(numbers, abs=0.02), REMEDY
    # The panels alone: letters depend on the version of FreeType.
    edge = 8 + PANEL_PX
    new, old = (pixels(path, edge + 8 + PANEL_PX, edge) for path in (drawn, committed))
    assert np.abs(new - old).mean() < 2, REMEDY


def test_the_readme_has_a_command_for_each_picture_and_a_page_shows_each():
    assert {path.name for path in FOLDER.iterdir()} == {*shown_pictures.commands(), NAMES}
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    }
    assert set(FOLDER.iterdir()) <= shown


def test_the_photographs_are_called_what_the_committed_picture_says(tmp_path):
    drawn, committed = shown_pictures.write_names(tmp_path), FOLDER / NAMES
    with Image.open(drawn) as image, Image.open(committed) as old:
        assert old.info["comment"].decode() == image.info["comment"].decode(), REMEDY
        assert old.size == image.size
    for number in range(len(read_photographs())):
        left, top = shown_pictures.place_of(number)
        # A photograph and the mark under it.
        box = np.s_[top : top + TILE + 24, left : left + 20]
        new, old_part = (pixels(path, 10_000, 10_000)[box] for path in (drawn, committed))
        assert np.abs(new - old_part).mean() < 2, REMEDY


def test_an_answer_is_right_by_any_of_the_names_and_marks_differ_without_colour():
    photograph = next(photo for photo in read_photographs() if photo.shows == "cat")
    for answer, judgement in (
        *(("cat", "right"), ("this is a cat", "right"), ("tabby", "right"), ("dog", "wrong")),
        *(("I don't know what this is", "declined"), ("a cat or a dog?", "declined")),
    ):
        assert shown_pictures.judge(photograph, answer) == judgement
    named = [shown_pictures.Named(photograph, "words", judgement) for judgement in COLOURS]
    sheet = np.asarray(shown_pictures.draw_names(named, "model").convert("L")).astype(int)
    marks = []
    for number in range(len(COLOURS)):
        left, top = shown_pictures.place_of(number)
        marks.append(sheet[top + TILE + 4 : top + TILE + 24, left : left + 20] < 200)
    assert all(mark.any() for mark in marks)
    assert not any(
        np.array_equal(a, b) for a, b in ((marks[0], marks[1]), (marks[0], marks[2]), (marks[1], marks[2]))
    )
    assert sheet.shape[1] == MARGIN + shown_pictures.COLUMNS * (TILE + MARGIN)
