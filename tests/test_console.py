"""Exit statuses and sentences that every command line shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest

from microvlm.console import echo, note, note_error, print_json, run_click
from microvlm.errors import UserError


@click.command("demo")
@click.option("--count", type=int, default=0)
@click.option("--raise", "kind", default="")
def demo(count: int, kind: str) -> int | None:
    if kind == "user":
        raise UserError("the file is empty; give another.")
    if kind == "full":
        raise OSError(28, "No space left on device", "out.bin")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "absent":
        raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")
    if kind == "ours":
        raise ModuleNotFoundError("No module named 'microvlm.x'", name="microvlm.x")
    if kind == "defect":
        raise ZeroDivisionError
    if kind == "import":
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
    if kind == "memory":
        raise MemoryError
    if kind == "json":
        print_json({"answer": "é\udcff"})
    return count or None


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        run_click(demo, arguments)
    return exit_info.value.code


FULL_DISK = "Error: out.bin: no space is left on the disk; free some or write elsewhere."
ABSENT = "Error: this command needs the package 'torch': pip install 'microvlm[export]'."
BAD_COUNT = "Error: Invalid value for '--count': 'many' is not a valid integer. (see demo --help)"


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ((), 0, ""),
        (("--count", "1"), 1, ""),
        (("--raise", "user"), 2, "Error: the file is empty; give another."),
        (("--raise", "full"), 2, FULL_DISK),
        (("--raise", "absent"), 2, ABSENT),
        (("--raise", "interrupt"), 130, "Interrupted."),
        (("--count", "many"), 2, BAD_COUNT),
    ],
)
def test_each_ending_has_its_status_and_one_line(arguments, status, sentence, capsys):
    assert status_of(*arguments) == status
    assert capsys.readouterr().err.strip() == sentence


def test_json_is_one_document_on_stdout(capsys):
    assert status_of("--raise", "json") == 0
    assert json.loads(capsys.readouterr().out) == {"answer": "é\udcff"}


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_click(demo, ["--raise", "defect"])
    with pytest.raises(ModuleNotFoundError, match=r"microvlm\.x"):
        run_click(demo, ["--raise", "ours"])


def test_what_a_terminal_would_obey_is_printed_as_escapes(capsys):
    echo("name\x1b[31m\n\tsecond\x9b2J\u202eline", end="")
    assert capsys.readouterr().out == "name\\x1b[31m\n\tsecond\\x9b2J\\u202eline"
    note("a\x1b]0;b\x07")
    assert capsys.readouterr().err == "a\\x1b]0;b\\x07\n"
    document = {"answer": "é\x1b[31m\x9b2J\x7f\u2028", "emoji": "\U0001f469\u200d\U0001f692"}
    print_json(document)
    printed = capsys.readouterr().out
    assert json.loads(printed) == document
    assert not set(printed) & set("\x1b\x9b\x7f\u2028")
    assert "é" in printed


def test_a_very_long_sentence_is_shortened(capsys):
    note_error("x" * 500_000 + " does not exist.")
    err = capsys.readouterr().err
    assert len(err) < 2000
    assert err.endswith(" does not exist.\n")


def test_an_interrupt_inside_the_import_of_a_compiled_module_is_an_interrupt(capsys):
    assert status_of("--raise", "import") == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_lack_of_memory_is_one_sentence(capsys):
    assert status_of("--raise", "memory") == 2
    assert "not enough memory" in capsys.readouterr().err


def test_a_light_module_starts_the_programs():
    """Until it has set its handler, an interrupt is a traceback."""
    program = "import sys; before = set(sys.modules); import microvlm.cli; print(*set(sys.modules) - before)"
    process = subprocess.run(
        [sys.executable, "-P", "-S", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    heavy = {"typing", "re", "enum", "signal", "contextlib", "collections", "functools", "click", "numpy"}
    assert "microvlm.cli" in process.stdout
    assert not heavy & set(process.stdout.split())


@pytest.mark.linux
def test_a_full_stdout_is_one_sentence_and_status_2():
    program = (
        "import sys, click; from microvlm.console import *\n"
        "@click.command()\ndef c():\n    print_json(list(range(10000)))\nrun_click(c, [])"
    )
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 2
    assert "no space is left" in process.stderr
    assert "Traceback" not in process.stderr


WRITER = (
    "import sys, click; from microvlm.console import *\n"
    "@click.command()\ndef c():\n"
    "    for i in range(int(sys.argv[1])):\n        click.echo('x' * 100)\n"
    "run_click(c, [])"
)


# With few lines the pipe breaks at the last flush, with many inside of the command.
@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_leaves_is_no_error(lines):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken_pipe:
        process = subprocess.run(
            [sys.executable, "-c", WRITER, str(lines)], stdout=broken_pipe, stderr=subprocess.PIPE, text=True
        )
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.posix
def test_a_closed_stdout_is_no_error():
    process = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 1 >&-', sys.executable, WRITER], stderr=subprocess.PIPE, text=True
    )
    assert (process.returncode, process.stderr) == (0, "")
