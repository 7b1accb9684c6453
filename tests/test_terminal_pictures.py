"""Pictures in a terminal: each protocol decoded again to the pixels, the choice among them, and the commands."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from terminals import Terminal
from test_memory_picture import file as facts_file  # noqa: F401

from microvlm.errors import UserError
from microvlm.terminal.picture_codes import half_blocks, iterm2, kitty, sixel
from microvlm.terminal.pictures import cells_of, kind_of

ROOT = Path(__file__).parent.parent
MAIN = [sys.executable, "-c", "from microvlm.commands.main import main; main()"]
BLOCK = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀")


@pytest.fixture
def picture() -> Image.Image:
    """Noise, which no encoder can shorten: more than one chunk of kitty's."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def pixels_of(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_kitty_gets_the_pixels_in_chunks(picture):
    codes = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(picture, 12, 4))
    assert len(codes) > 1
    assert [keys.rpartition("m=")[2] for keys, _ in codes] == ["1"] * (len(codes) - 1) + ["0"]
    assert codes[0][0] == "a=T,f=100,q=2,c=12,r=4,m=1"
    assert all(len(data) <= 4096 and (len(data) % 4 == 0) for _, data in codes)
    data = base64.b64decode("".join(data for _, data in codes), validate=True)
    assert np.array_equal(pixels_of(data), np.asarray(picture))


def test_iterm2_gets_the_pixels_and_their_number_of_bytes(picture):
    found = re.fullmatch(
        r"\x1b\]1337;File=size=(\d+);width=12;height=4;.*inline=1:(.*)\a\n", iterm2(picture, 12, 4)
    )
    assert found is not None
    data = base64.b64decode(found[2], validate=True)
    assert len(data) == int(found[1])
    assert np.array_equal(pixels_of(data), np.asarray(picture))


def test_a_half_block_is_two_pixels():
    pixels = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    lines = half_blocks(Image.fromarray(pixels), 5, 3).splitlines()
    assert len(lines) == 3
    for row, line in enumerate(lines):
        assert line.endswith("\x1b[0m")
        cells = np.array([list(map(int, cell)) for cell in BLOCK.findall(line)], np.uint8)
        assert np.array_equal(cells[:, :3], pixels[2 * row])
        assert np.array_equal(cells[:, 3:], pixels[2 * row + 1])


@pytest.mark.parametrize("size", [(60, 40), (7, 6), (1, 1), (13, 25)])
def test_a_sixel_decoder_gets_the_pixels_back(size, tmp_path):
    """libsixel's own program decodes: colours are percentages, so that a value may be off by two of 255."""
    decoder = shutil.which("sixel2png")
    if decoder is None:
        pytest.skip("sixel2png is not installed: apt-get install libsixel-bin")
    columns, rows = size
    numbers = np.random.default_rng(2).integers(0, 5, (rows, columns))
    numbers[:, columns // 2 :] = 3  # long runs
    colours = np.array([(0, 0, 0), (255, 255, 255), (200, 30, 10), (20, 90, 240), (90, 90, 90)], np.uint8)
    source = tmp_path / "picture.six"
    source.write_text(sixel(Image.fromarray(colours[numbers])))
    subprocess.run([decoder, "-i", str(source), "-o", str(tmp_path / "back.png")], check=True, timeout=60)
    with Image.open(tmp_path / "back.png") as image:
        back = np.asarray(image.convert("RGB"))[:rows, :columns].astype(int)
    assert np.abs(back - colours[numbers]).max() <= 2


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230801"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "210401"}, "line"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm", "COLORTERM": "truecolor"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": "1"}, "line"),
        ({"TERM": "xterm-256color"}, "line"),
        # Inside tmux the variables of the terminal around it remain.
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux,1,0"}, "line"),
        ({"TERM": "xterm-256color", "MICROVLM_PICTURES": "sixel"}, "sixel"),
        ({"TERM": "xterm-kitty", "MICROVLM_PICTURES": ""}, "kitty"),
    ],
)
def test_the_kind_of_a_terminal_is_read_from_its_variables(variables, kind):
    assert kind_of(variables) == kind


def test_an_unknown_kind_is_one_sentence():
    with pytest.raises(
        UserError, match=r"MICROVLM_PICTURES is 'jpeg'; give one of kitty, iterm2, sixel, blocks, line"
    ):
        kind_of({"MICROVLM_PICTURES": "jpeg"})


@pytest.mark.parametrize(
    ("size", "cells"),
    [((480, 480), (40, 20)), ((960, 240), (48, 6)), ((10, 9000), (1, 20)), ((9000, 10), (48, 1))],
)
def test_a_picture_keeps_its_shape_in_cells(size, cells):
    assert cells_of(*size, 48, 20) == cells


def environment(**variables: str) -> dict[str, str]:
    known = (
        "COLORTERM",
        "TERM_PROGRAM",
        "KITTY_WINDOW_ID",
        "KONSOLE_VERSION",
        "LC_TERMINAL",
        "TMUX",
        "NO_COLOR",
    )
    own = {name: value for name, value in os.environ.items() if name not in known}
    return {**own, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PYTHONUTF8": "1", **variables}


def on_terminal(arguments: list[str], folder: Path, **variables: str) -> str:
    with Terminal([*MAIN, *arguments], environment(**variables), cwd=folder) as terminal:
        return terminal.read_all().replace("\r\n", "\n")


@pytest.mark.posix
def test_memory_plot_shows_what_it_draws(facts_file, tmp_path):  # noqa: F811
    arguments = ["memory", "plot", facts_file.name, "-o", "plot.png"]
    shown = on_terminal(arguments, tmp_path, MICROVLM_PICTURES="kitty")
    assert shown.startswith("\x1b_Ga=T,f=100")
    assert shown.rstrip().endswith("in use")
    with Image.open(tmp_path / "plot.png") as sheet:
        line = f"plot.png: {sheet.width} x {sheet.height} pixels\n"
    assert on_terminal(arguments, tmp_path).startswith(line)
    blocks = on_terminal(arguments, tmp_path, COLORTERM="truecolor")
    assert 10 < len(BLOCK.findall(blocks.split("\n")[0])) < 80
    assert "plot.png:" not in on_terminal([*arguments, "--no-show"], tmp_path)
    assert "plot.png:" not in on_terminal([*arguments, "--json"], tmp_path)


@pytest.mark.posix
def test_a_pipe_gets_no_picture_and_a_line_where_it_is_asked_for(facts_file, tmp_path):  # noqa: F811
    def piped(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*MAIN, "memory", "plot", facts_file.name, "-o", "plot.png", *more],
            env=environment(MICROVLM_PICTURES="kitty"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    silent, asked = piped(), piped("--show")
    assert silent.stderr == ""
    assert re.fullmatch(r"plot\.png: \d+ x \d+ pixels\n", asked.stderr)
    assert silent.stdout == asked.stdout
    assert "\x1b" not in asked.stdout + asked.stderr


@pytest.mark.posix
def test_caption_shows_the_picture_before_its_answer(speaking_checkpoint, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    model = ["--model", str(speaking_checkpoint), "--max-new-tokens", "3", "--threads", "1"]
    shown = on_terminal(["caption", "a.png", *model], tmp_path, MICROVLM_PICTURES="iterm2")
    shown = shown.rpartition("\r\x1b[K")[2]  # behind the line that the model is loaded
    assert shown.startswith("\x1b]1337;File=size=")
    assert shown.count("\x1b]1337") == 1
    assert "\a\n" in shown
    drawn = on_terminal(["caption", "a.png", *model, "--attention", "maps.png"], tmp_path)
    with Image.open(tmp_path / "maps.png") as sheet:
        assert f"maps.png: {sheet.width} x {sheet.height} pixels\n" in drawn
    assert "a.png:" not in drawn
    scored = on_terminal(["caption", "a.png", *model, "--evidence", "parts.png"], tmp_path)
    lines = [line.rpartition("\r\x1b[K")[2] for line in scored.split("\n")]
    assert any(re.fullmatch(r"(\d+) of \1 pictures scored(  \d+ s)?", line) for line in lines)
    assert lines[-2].startswith("parts.png: ")


@pytest.mark.posix
def test_chat_shows_a_picture_that_comes_into_view(speaking_checkpoint, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    model = ["--model", str(speaking_checkpoint), "--max-new-tokens", "3", "--threads", "1"]
    with Terminal([*MAIN, "chat", *model], environment(MICROVLM_PICTURES="sixel"), cwd=tmp_path) as terminal:
        terminal.read_until("> ")
        terminal.type("/image a.png\n")
        terminal.read_until("\x1b\\", len(terminal.written))
        terminal.type("what is this?\n/quit\n")
        assert terminal.read_all().count("\x1bPq") == 1
