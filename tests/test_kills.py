"""Writers that are killed at system calls and at random moments, by `python tests/kills`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parent / "kills"
pytestmark = pytest.mark.linux


def run(program: str, *arguments: object) -> list:
    """The JSON that a program with tests/kills on its path prints."""
    program = f"import json, os, sys\nsys.path.insert(0, {str(KILLS)!r})\nimport traced\n" + program
    command = [sys.executable, "-P", "-c", program, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    if process.stdout == "cannot trace\n":
        pytest.skip("system calls cannot be traced here")
    return json.loads(process.stdout)


def test_a_child_is_killed_right_before_each_call_that_changes_files(tmp_path):
    program = """
if not traced.can_trace():
    raise SystemExit(print("cannot trace"))
def work():
    os.chdir(sys.argv[1])
    os.stat(".")
    descriptor = os.open("file", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, b"abc")
    os.fsync(descriptor)
    os.close(os.open("file", os.O_RDONLY))
    os.rename("file", "other")
calls = [traced.kill_at_call(work, number) for number in range(5)]
print(json.dumps([calls, sorted(os.listdir(sys.argv[1])), traced.kill_after(work, None)]))
"""
    calls, names, was_killed = run(program, tmp_path)
    assert calls[0] in ("open", "openat")
    assert calls[1:] == ["write", "fsync", calls[3], None]
    assert calls[3].startswith("rename")
    assert names == ["other"]
    assert was_killed is False


def test_a_writer_that_fails_by_itself_is_an_error():
    program = """
if not traced.can_trace():
    raise SystemExit(print("cannot trace"))
try:
    traced.kill_at_call(lambda: 1 / 0, 5)
except RuntimeError as error:
    print(json.dumps([str(error)]))
"""
    assert "the writer failed" in run(program)[0]


@pytest.mark.export
def test_every_writer_leaves_old_or_new_and_the_next_command_nothing_else(speaking_bundle, tmp_path):
    output = tmp_path / "counts.json"
    command = [
        sys.executable,
        "-P",
        KILLS,
        "--bundle",
        speaking_bundle,
        "--json",
        output,
        "--seed",
        str(os.getpid()),
    ]
    process = subprocess.run(
        [*map(str, command), "--count", "3", "--stride", "7"], capture_output=True, text=True, check=False
    )
    if "cannot be traced" in process.stderr:
        pytest.skip("system calls cannot be traced here")
    assert process.returncode == 0, process.stdout + process.stderr
    writers = json.loads(output.read_text())["writers"].values()
    assert len(writers) == 7
    assert sum(kills["at_calls"] for kills in writers) > 10
    assert sum(kills["with_leftovers"] for kills in writers) > 5
