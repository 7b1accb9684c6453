"""One writer at a time: processes that write one memory file lose no row, and one that gives up says who holds it."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import files_below
from stepping_memory import PRINT, Stepping, entries, texts

from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.memory.episodic import EpisodicMemory
from microvlm.memory.file_lock import locked
from microvlm.memory.memory_file import read_memory, save_memory, store_memory

HOLD = """
import sys
from microvlm.memory.file_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
COUNT = """
import sys
from pathlib import Path
from microvlm.memory.file_lock import locked
path = Path(sys.argv[1])
for _ in range(200):
    with locked(path, wait_s=60):
        path.write_text(str(int(path.read_text()) + 1))
"""


def start(program: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", program, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of trip.mem."""
    process = start(HOLD, tmp_path / "trip.mem")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.posix
def test_memory_writes_at_once_from_three_processes_lose_no_row(speaking_bundle, tmp_path):
    trip = tmp_path / "trip.mem"
    program = "from microvlm.commands.main import main; main()"
    command = [sys.executable, "-P", "-c", program, "memory", "write", str(trip), "--threads", "1"]
    command += ["--model", str(speaking_bundle), "--text"]
    running = [subprocess.Popen([*command, f"number {number}"]) for number in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    memory, _ = read_memory(trip)
    assert sorted(entry.text for entry in memory.entries) == ["number 0", "number 1", "number 2"]
    assert os.listdir(tmp_path) == ["trip.mem"]


@pytest.mark.posix
def test_no_step_of_two_processes_comes_between_another_ones(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    running = [start(COUNT, path) for _ in range(2)]
    for process in running:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert path.read_text() == "400"


@pytest.mark.posix
def test_who_waits_too_long_is_told_which_process_has_the_file(holder, tmp_path):
    sentence = f"trip.mem is being changed by process {holder.pid}"
    with pytest.raises(UserError, match=sentence), locked(tmp_path / "trip.mem", wait_s=0.1):
        pass
    with locked(tmp_path / "other.mem", wait_s=0.1):
        assert (tmp_path / ".other.mem.lock").read_text() == str(os.getpid())
    holder.communicate("go on\n")
    with locked(tmp_path / "trip.mem", wait_s=0.1):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.posix
def test_a_link_has_the_lock_of_the_file_that_it_leads_to(holder, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = folder / "link.mem"
    link.symlink_to(tmp_path / "trip.mem")
    sentence = f"link.mem is being changed by process {holder.pid}"
    with pytest.raises(UserError, match=sentence), locked(link, wait_s=0.1):
        pass
    holder.communicate("go on\n")
    with locked(link, wait_s=0.1):
        assert os.listdir(folder) == ["link.mem"]


@pytest.mark.posix
def test_a_planted_lock_file_never_empties_another_file(tmp_path):
    precious, lock_file = tmp_path / "precious", tmp_path / ".trip.mem.lock"
    precious.write_text("keep")
    for plant in (lock_file.symlink_to, lock_file.hardlink_to):
        plant(precious)
        with pytest.raises(UserError, match=r"\.trip\.mem\.lock is a link"), locked(tmp_path / "trip.mem"):
            pass
        lock_file.unlink()
    assert precious.read_text() == "keep"


@pytest.mark.posix
def test_a_pipe_is_refused_before_anything_waits_for_it(tmp_path):
    pipe = tmp_path / "pipe.mem"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="is a pipe or a device"), locked(pipe):
        pass
    assert os.listdir(tmp_path) == ["pipe.mem"]


@pytest.mark.posix
def test_a_reader_that_keeps_the_file_locked_stops_no_writer(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr("microvlm.memory.appended_file.LOCK_WAIT_S", 0.1)
    path, runtime = tmp_path / "trip.mem", Stepping()
    memory = EpisodicMemory.empty(runtime)
    save_memory(memory, path, PRINT)
    with path.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        for row in entries(2):
            memory.write(runtime, row)
            store_memory(memory, path, PRINT)
        assert not os.path.samestat(os.fstat(reader.fileno()), path.stat())
    assert texts(read_memory(path)[0]) == ["fact 0", "fact 1"]
    assert os.listdir(tmp_path) == ["trip.mem"]


@pytest.mark.posix
def test_a_full_disk_keeps_no_lock_from_anybody(tmp_path):
    with files_below(0), locked(tmp_path / "trip.mem", wait_s=0.1):
        assert (tmp_path / ".trip.mem.lock").read_text() == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.posix
def test_a_file_system_without_locks_is_written_without_a_lock(tmp_path, monkeypatch):
    import fcntl

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "trip.mem"
    with locked(path, wait_s=0.1):
        path.write_text("written")
    assert os.listdir(tmp_path) == ["trip.mem"]


@pytest.mark.posix
def test_the_lock_of_a_killed_process_is_free(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "trip.mem", wait_s=0.1):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.posix
def test_a_chat_keeps_others_from_its_file_and_lets_go_of_it(
    holder, speaking_bundle, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("microvlm.memory.file_lock.WAIT_S", 0.1)
    flags = ["--memory", str(tmp_path / "trip.mem"), "--model", str(speaking_bundle)]

    def chat() -> int:
        with pytest.raises(SystemExit) as exit_info:
            run_click(cli, ["chat", *flags])
        return exit_info.value.code

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert chat() == 2
    assert "is being changed by process" in capsys.readouterr().err
    holder.communicate("go on\n")
    assert chat() == 0
    assert os.listdir(tmp_path) == ["trip.mem"]
