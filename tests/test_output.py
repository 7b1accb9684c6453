"""Output that cannot fail after a change was saved: every command with odd encodings, and with full and closed streams.

Commands run in forks of one process that has imported them, whose streams are real files and descriptors.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from microvlm.memory.memory_file import read_memory

pytestmark = [pytest.mark.posix, pytest.mark.linux]

DRIVER = r"""
import io, json, os, sys
import microvlm.commands.main, microvlm.generation, microvlm.backends.ort, microvlm.memory.facts
import microvlm.memory.conversation, microvlm.bench.bench_command, microvlm.exporters.export_command
import microvlm.training.data.data_command, microvlm.training.scoring.score_command, microvlm.training.train_command
import microvlm.commands.info, microvlm.bench.report, microvlm.cli, onnxruntime

requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_RDWR), 0)
for line in requests:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    replies.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
    replies.flush()
else:
    sys.exit()
os.close(requests.fileno()); os.close(replies.fileno())
os.environ["TERM"] = "dumb"
for number, name in enumerate(("stdin", "stdout", "stderr")):
    kind = job[name]
    if kind is None:
        os.close(number)
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)
        continue
    if kind == "broken pipe":
        reading, opened = os.pipe()
        os.close(reading)
    else:
        opened = os.open(kind, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    raw = io.BufferedReader(io.FileIO(0, closefd=False)) if number == 0 else io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    encoding, _, errors = job["encoding"].partition(":")
    stream = io.TextIOWrapper(raw, encoding, errors or "strict", write_through=number == 2)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)
sys.argv = [job["program"], *map(os.fsdecode, map(bytes.fromhex, job["arguments"]))]
getattr(microvlm.cli, job["entry"])()
"""  # noqa: E501


class Result(NamedTuple):
    status: int
    out: bytes
    err: bytes


class Programs:
    """Runs the console scripts in forks of `DRIVER`."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __call__(
        self,
        *arguments: str | bytes | Path,
        entry: str = "main",
        encoding: str = "utf-8:strict",
        stdin: str | Path | None = os.devnull,
        stdout: str | None = "file",
        stderr: str | None = "file",
    ) -> Result:
        out, err = self.folder / "stdout", self.folder / "stderr"
        for path in (out, err):
            path.unlink(missing_ok=True)
        job = {
            "program": "microvlm",
            "entry": entry,
            "arguments": [os.fsencode(argument).hex() for argument in arguments],
            "encoding": encoding,
            "stdin": stdin and str(stdin),
            "stdout": str(out) if stdout == "file" else stdout,
            "stderr": str(err) if stderr == "file" else stderr,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return Result(status, *(path.read_bytes() if path.exists() else b"" for path in (out, err)))


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Iterator[Programs]:
    programs = Programs(tmp_path_factory.mktemp("streams"))
    yield programs
    programs.process.communicate()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A picture under a plain name and under one that is not UTF-8, and lines for chat."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    os.link(tmp_path / "a.png", os.fsencode(tmp_path) + b"/b\xff.png")
    (tmp_path / "lines").write_text("/memory\nwhat is this?\n")
    return tmp_path


REPORT = Path(__file__).parent.parent / "docs" / "results" / "equivalence-nano.json"


def reading_commands(folder: Path, model: Path) -> dict[str, list[str | bytes | Path]]:
    """Commands that change nothing, by name; `folder` has a memory with one entry, `trip.mem`."""
    pictures = [folder / "a.png", os.fsencode(folder) + b"/b\xff.png"]
    on_model = ["--model", model]
    return {
        "caption": ["caption", *pictures, *on_model, "--max-new-tokens", "2"],
        "caption --json": ["caption", *pictures, *on_model, "--max-new-tokens", "2", "--json"],
        "list": ["memory", "list", folder / "trip.mem"],
        "list --json": ["memory", "list", folder / "trip.mem", "--json"],
        "read": ["memory", "read", folder / "trip.mem", "--question", "who?", "--max-new-tokens", "2", *on_model],
        "info": ["info", model],
        "info --json": ["info", model, "--json"],
    }  # fmt: skip


CHANGES: dict[str, list[str]] = {
    "write": ["write", "--question", "who?", "--text", "pizza \U0001f355"],
    "overwrite": ["overwrite", "--question", "who?", "--text", "\U0001f355 \u010d"],
    "overwrite --json": ["overwrite", "--question", "who?", "--text", "\U0001f355", "--json"],
    "rebuild": ["rebuild"],
    "forget": ["forget", "--entry", "1"],
    "write --json": ["write", "--question", "who?", "--text", "\U0001f355 \x1b[31m", "--json"],
    "reset": ["reset"],
}
"""Commands that change a memory file, in an order in which each can, and how many entries the file has after each."""
ENTRIES = {"forget": 0, "reset": 0}


def change(program: Programs, name: str, folder: Path, model: Path, **streams: str | None) -> Result:
    return program("memory", *CHANGES[name], folder / "trip.mem", "--model", model, **streams)


def assert_state(folder: Path, name: str) -> None:
    assert len(read_memory(folder / "trip.mem")[0].entries) == ENTRIES.get(name, 1), name


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8:strict"])
def test_every_command_prints_in_every_encoding(encoding, program, folder, speaking_bundle):
    for name in CHANGES:
        result = change(program, name, folder, speaking_bundle, encoding=encoding)
        assert (result.status, result.err) == (0, b""), name
        assert_state(folder, name)
        if "--json" in name:
            assert json.loads(result.out)["entries"] == ENTRIES.get(name, 1)
    change(program, "write", folder, speaking_bundle)
    for name, arguments in reading_commands(folder, speaking_bundle).items():
        result = program(*arguments, encoding=encoding)
        assert (result.status, result.err) == (0, b""), name
        assert result.out.decode(encoding.partition(":")[0])
        if "--json" in name:
            json.loads(result.out)
    result = program("report", REPORT, entry="bench", encoding=encoding)
    assert (result.status, result.err) == (0, b"")


def test_a_change_that_is_saved_has_status_0_whether_or_not_it_can_be_printed(
    program, folder, speaking_bundle
):
    for stdout in ("/dev/full", None, "broken pipe"):
        for name in CHANGES:
            result = change(program, name, folder, speaking_bundle, stdout=stdout)
            assert result.status == 0, name
            assert_state(folder, name)
            assert result.err.count(b"\n") == (stdout == "/dev/full")
            if stdout == "/dev/full":
                assert b"no space is left on the disk" in result.err
                assert b"what the command did is saved" in result.err


def test_an_answer_that_cannot_be_printed_is_one_sentence_and_status_2(program, folder, speaking_bundle):
    change(program, "write", folder, speaking_bundle)
    before = (folder / "trip.mem").read_bytes()
    commands = {
        **reading_commands(folder, speaking_bundle),
        "chat": ["chat", "--model", speaking_bundle],
        "help": ["--help"],
        "version": ["--version"],
    }
    for name, arguments in commands.items():
        stdin = folder / "lines" if name == "chat" else os.devnull
        result = program(*arguments, stdout="/dev/full", stdin=stdin)
        assert result.status == 2, name
        assert result.err.count(b"\n") == 1, result.err
        assert b"no space is left on the disk" in result.err
        for stdout in (None, "broken pipe"):
            result = program(*arguments, stdout=stdout, stdin=stdin)
            assert result.status == 0, name
            assert b"Error" not in result.err, name
    assert (folder / "trip.mem").read_bytes() == before
    result = program("report", REPORT, entry="bench", stdout="/dev/full")
    assert (result.status, result.err.count(b"\n")) == (2, 1)


def test_a_turn_that_could_not_be_printed_is_not_remembered(program, folder, speaking_bundle):
    (folder / "lines").write_text(f"/image {folder / 'a.png'} what is this?\n")
    chat = ["chat", "--memory", folder / "trip.mem", "--model", speaking_bundle]
    assert program(*chat, stdout="/dev/full", stdin=folder / "lines").status == 2
    assert read_memory(folder / "trip.mem")[0].entries == []
    assert program(*chat, stdin=folder / "lines").status == 0
    # The picture under its place, and the answered question.
    assert len(read_memory(folder / "trip.mem")[0].entries) == 2


@pytest.mark.parametrize("stderr", [None, "/dev/full", "broken pipe"])
def test_a_stderr_that_takes_nothing_changes_no_status(stderr, program, folder, speaking_bundle):
    for name in CHANGES:
        # The second write under a question notes the first one on stderr.
        assert change(program, name, folder, speaking_bundle, stderr=stderr).status == 0, name
        assert_state(folder, name)
    assert change(program, "forget", folder, speaking_bundle, stderr=stderr).status == 2
    assert change(program, "forget", folder, speaking_bundle, stderr=stderr, stdout=None).status == 2
    chat = ["chat", "--model", speaking_bundle]
    assert program(*chat, stdin=folder / "lines", stderr=stderr).status == 0


def test_a_file_of_the_command_never_takes_the_place_of_a_closed_stream(program, folder, speaking_bundle):
    """With descriptor 1 free, the next file that is opened would get it, and what is printed to it."""
    closed = {"stdin": None, "stdout": None, "stderr": None}
    for name in CHANGES:
        assert change(program, name, folder, speaking_bundle, **closed).status == 0, name
        assert_state(folder, name)
    assert program("chat", "--model", speaking_bundle, **closed).status == 0


def test_chat_without_a_stdin_ends_at_once(program, speaking_bundle):
    assert program("chat", "--model", speaking_bundle, stdin=None) == Result(0, b"", b"")


def test_the_other_programs_name_mistakes_in_any_encoding_and_without_a_stdout(program, tmp_path):
    """Mistakes that are seen before PyTorch is imported."""
    for entry, arguments in (
        ("export", ["nano", "--bits", "\u010d"]),
        ("data", ["evalset", str(tmp_path / "\u010d"), "-o", str(tmp_path / "x")]),
        ("score", ["nano", "--\u010d"]),
        ("train", ["nano", "--data", "x", "-o", "x", "--threads", "\u010d"]),
        ("bench", ["report", str(tmp_path / "\u010d")]),
    ):
        for streams in ({"encoding": "cp1252"}, {"stdout": "/dev/full"}, {"stdout": None}):
            result = program(*arguments, entry=entry, **streams)
            assert result.status == 2, (entry, result.err)
            assert result.err.count(b"\n") == 1, (entry, result.err)
    assert not (tmp_path / "x").exists()


def test_no_traceback_when_a_start_is_interrupted(folder, speaking_bundle):
    """SIGINT at random moments from the first import to the answer; before it the interpreter itself starts."""
    rng, running = random.Random(5), "from microvlm.cli import main; import os; os.write(1, b'-'); main()"
    command = [sys.executable, "-P", "-c", running, "caption", str(folder / "a.png"), "--model"]
    for _ in range(12):
        with subprocess.Popen(
            [*command, str(speaking_bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            time.sleep(rng.uniform(0.001, 0.5))
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        assert process.returncode in (0, 130), err
        assert b"Traceback" not in err
        assert (err.strip() == b"Interrupted.") == (process.returncode == 130), err


def test_a_program_in_the_background_stays_deaf_to_interrupts(folder, speaking_bundle):
    """A shell starts it with SIGINT ignored."""
    program = "import signal; signal.signal(2, signal.SIG_IGN); from microvlm.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, "caption", folder / "a.png", "--model", speaking_bundle]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert out
