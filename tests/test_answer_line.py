"""A caption on a terminal appears token by token, and ends as the same text that a pipe gets whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from terminals import Terminal

ROOT = Path(__file__).parent.parent
MAIN = "from microvlm.commands.main import main; main()"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
SAY = """
import sys
from microvlm.inputs.processor import Processor
from microvlm.sources.model_source import find_folder
from microvlm.terminal.answer_line import AnswerLine
processor = Processor.from_pretrained(find_folder("nano"))
words, answer, prefix, is_final = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "final"
line = AnswerLine.on_terminal(processor.stream(), prefix, is_final)
if line is None:
    print("no terminal")
    sys.exit()
for token in processor.text_ids(words):
    line.feed(0, token)
line.finish(answer) if answer else line.close()
print("end")
"""
pytestmark = pytest.mark.posix


def written(*arguments: str, columns: int = 80, **variables: str) -> str:
    """All that the program above writes on a terminal."""
    command = [sys.executable, "-c", SAY, *arguments]
    with Terminal(command, ENVIRONMENT | variables, columns) as terminal:
        return terminal.read_all().replace("\r\n", "\n")


def visible(text: str) -> str:
    """What stays on the terminal's last line that a text was written on."""
    lines = [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]
    return "\n".join(re.sub(r"\x1b\[\d*m", "", line) for line in lines).rstrip("\n")


def test_an_answer_that_may_be_declined_is_shown_faint_and_replaced():
    text = written("a red apple on a table", "I don't know", "", "may change")
    assert text.count("\x1b[2m") >= 5
    assert re.sub(r"\x1b\[\d*m", "", text).startswith("a red apple on a table\r\x1b[KI don't know\n")
    assert visible(text) == "I don't know\nend"


def test_a_final_answer_is_written_once_and_without_escapes():
    assert written("a red apple", "a red apple", "cat.png: ", "final") == "cat.png: a red apple\nend\n"


def test_an_answer_wider_than_the_terminal_waits_for_its_end():
    words = "a red apple on a table in a room of a house"
    text = written(words, words, "cat.png: ", "may change", columns=24)
    shown = re.sub(r"\x1b\[\d*m", "", text.partition("\r\x1b[K")[0])
    assert "cat.png: a red" in shown
    assert len(shown) < 24
    assert visible(text) == f"cat.png: {words}\nend"


def test_an_error_in_the_middle_ends_the_line():
    assert written("a red apple", "", "", "final") == "a red apple\nend\n"


def test_no_token_is_shown_where_a_line_cannot_be_erased():
    assert written("a red apple", "a red apple", "", "final", TERM="dumb") == "no terminal\n"
    command = [sys.executable, "-c", SAY, "a red apple", "a red apple", "", "final"]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert process.stdout == "no terminal\n", process.stderr


def test_a_caption_is_the_same_on_a_terminal_and_on_a_pipe(speaking_checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    arguments = [
        "--no-show",
        "a.png",
        "b.png",
        "--model",
        str(speaking_checkpoint),
        "--max-new-tokens",
        "8",
        "--threads",
        "1",
    ]
    command = [sys.executable, "-c", MAIN, "caption", *arguments]
    with Terminal(command, ENVIRONMENT, columns=500, cwd=tmp_path) as terminal:
        shown = terminal.read_all()
    piped = subprocess.run(
        command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert piped.stdout.count("\n") >= 2, piped.stderr
    assert "\x1b" not in piped.stdout
    assert visible(shown.replace("\r\n", "\n")) == piped.stdout.rstrip("\n")


def test_chat_shows_a_calibrated_models_tokens_before_the_answer(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    command = [
        sys.executable,
        "-c",
        MAIN,
        "chat",
        "--model",
        "photo",
        "--backend",
        "torch",
        "--no-show",
        "--threads",
        "1",
    ]
    with Terminal(command, ENVIRONMENT, cwd=tmp_path) as terminal:
        terminal.read_until("\n> ")
        at = len(terminal.written)
        terminal.type("/image a.png\n")
        shown = terminal.read_until("\n> ", at).replace("\r\n", "\n")
        terminal.type("/quit\n")
        terminal.read_all()
    faint, erased, answer = shown.partition("\r\x1b[K")
    assert erased
    assert faint.count("\x1b[2m") >= 1
    assert re.fullmatch(r"[^\x1b\n]+\n> ", answer)
