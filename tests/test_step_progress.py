"""Progress of long commands: a line that moves on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminals import Terminal
from test_memory_picture import file as facts_file  # noqa: F401

from microvlm.terminal.step_progress import render

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
EXPORT_S = 900
WORK = """
import os, time
from microvlm.console import echo, note
from microvlm.terminal.step_progress import counted, step, waiting
step("reading")
time.sleep(2.3)
note("a remark")
for number in range(1, 4):
    step(f"round {number} of 3")
show = counted("pictures")
show(1, 1000)
show(1000, 1000)
with waiting("loading"):
    time.sleep(0.1)
step("the last step")
if hasattr(os, "fork"):
    if os.fork() == 0:
        note("a child")
        os._exit(0)
    os.wait()
echo("the result")
"""


def bench(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from microvlm.bench.bench_command import main; main()", *arguments]


def on_terminal(command: list[str], columns: int = 80) -> str:
    with Terminal(command, ENVIRONMENT, columns) as terminal:
        shown = terminal.read_all(EXPORT_S).replace("\r\n", "\n")
        assert terminal.process.returncode == 0, shown
    return shown


def visible(text: str) -> list[str]:
    """The lines that remain on the terminal."""
    return [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]


def piped(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.posix
def test_a_terminal_gets_a_line_that_moves_and_keeps_what_was_done():
    shown = on_terminal([sys.executable, "-c", WORK])
    assert len(set(re.findall(r"reading  (\d+) s", shown))) >= 2
    lines = [re.sub(r"  \d+ s$", "", line) for line in visible(shown)]
    assert lines[:5] == ["a remark", "reading", "round 3 of 3", "1,000 of 1,000 pictures", "a child"]
    assert lines[5:] == ["the last step", "the result", ""]
    assert "loading  0 s" in shown
    assert f"round 1 of 3  [{'#' * 7}{' ' * 13}]  0 s" in shown


def test_a_log_gets_a_line_a_step():
    process = piped([sys.executable, "-c", WORK])
    steps = [
        "reading",
        "a remark",
        "round 1 of 3",
        "round 2 of 3",
        "round 3 of 3",
        "the last step",
        "a child",
    ]
    assert process.stderr.splitlines() == [line for line in steps if line != "a child" or hasattr(os, "fork")]
    assert process.stdout == "the result\n"


@pytest.mark.parametrize(
    ("text", "seconds", "cells", "line"),
    [
        ("timing", 61.4, 40, "timing  61 s"),
        ("round 1 of 2", 0, 60, "round 1 of 2  [##########          ]  0 s"),
        ("0 of 0 pages", 1, 60, "0 of 0 pages  [####################]  1 s"),
        ("7 of 2 pages", 1, 60, "7 of 2 pages  [####################]  1 s"),
        ("a very long step", 3, 12, "a very   3 s"),
        ("猫猫猫猫", 3, 10, "猫猫  3 s"),
        ("timing", 3, 0, ""),
    ],
)
def test_the_line_fits_its_terminal(text, seconds, cells, line):
    assert render(text, seconds, cells) == line


@pytest.mark.posix
def test_report_counts_pages_on_a_terminal_and_is_silent_on_a_pipe(tmp_path):
    for number in range(3):
        (tmp_path / f"page{number}.md").write_text("# A page\n")
    command = bench("report", "--pages", str(tmp_path), "--check")
    shown = on_terminal(command)
    for done in (1, 2, 3):
        assert re.search(rf"\r\x1b\[K{done} of 3 pages rendered  \[#+ *\]", shown)
    assert visible(shown) == ["3 of 3 pages rendered", ""]
    process = piped(command)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.posix
@pytest.mark.export
def test_an_export_moves_on_a_terminal_and_ends_with_its_table(speaking_checkpoint, tmp_path):
    command = [
        *[sys.executable, "-c", "from microvlm.exporters.export_command import main; main()"],
        *[str(speaking_checkpoint), "-o", str(tmp_path / "bundle"), "--threads", "1"],
    ]
    shown = on_terminal(command, columns=200)
    moving = re.findall(r"\r\x1b\[Kgraph (\d+) of (\d+): (\w+)  \[#* *\]  (\d+) s", shown)
    assert [int(number) for number, _, _, _ in moving] == sorted(int(number) for number, _, _, _ in moving)
    assert {number for number, _, _, _ in moving} == {str(n + 1) for n in range(int(moving[0][1]))}
    lines = visible(shown)
    table = next(number for number, line in enumerate(lines) if line.startswith("✓"))
    checked = [line for line in lines if "checked against PyTorch" in line]
    assert lines[: len(checked)] == checked
    assert len(checked) == int(moving[0][1]) == table
