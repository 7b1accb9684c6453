"""A memory file whose writer is killed is old or new, and whole; the next writer leaves nothing else behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.posix

_COMMON = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from stepping_memory import PRINT, SLOTS, Stepping, counts_agree, entries, older_file, texts
from microvlm.memory import memory_file
from microvlm.memory.episodic import EpisodicMemory
from microvlm.memory.file_lock import locked
from microvlm.memory.memory_file import load_memory, read_memory, save_memory, store_memory

folder, runtime = Path(sys.argv[2]), Stepping()
path = folder / "trip.mem"
memory_file._BETWEEN_LOOKS_S = 0

def read():
    "The texts in the file, which has to be whole, and whether something was said."
    sentences = []
    memory, _ = read_memory(path, say=sentences.append)
    memory.write_pending(runtime)
    assert counts_agree(memory)
    return texts(memory), bool(sentences)

def change(step):
    "What a command does."
    with locked(path, wait_s=5):
        memory, _ = read_memory(path, say=lambda _: None)
        memory.write_pending(runtime)
        step(memory)
        store_memory(memory, path, PRINT)

def write(number):
    return lambda memory: memory.write(runtime, entries(1, first=number)[0])

def go_on(before):
    "The next command: it works and leaves nothing behind."
    change(write(777))
    assert read() == ([*before, "fact 777"], False), (before, read())
    assert os.listdir(folder) == ["trip.mem"], os.listdir(folder)

def forked(work):
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return process
"""

# Forks a writer for each n, which kills itself right before its n-th event: calls of the file system as Python's audit
# hooks report them, and flushes and writes, which they do not report. A write that is the n-th event is half done.
_EVERYWHERE = (
    _COMMON
    + """
kind = sys.argv[3]
rows = {"fill": SLOTS - 1, "forget": SLOTS + 2}.get(kind, 3)
step = {
    "forget": lambda memory: memory.forget(runtime, 1),
    "overwrite": lambda memory: memory.overwrite(runtime, 1, entries(1, first=50)[0]),
}.get(kind, write(rows))

def prepare():
    memory = EpisodicMemory.empty(runtime)
    save_memory(memory, path, PRINT)
    for entry in entries(rows):
        memory.write(runtime, entry)
        store_memory(memory, path, PRINT)
    if kind == "torn":
        os.truncate(path, path.stat().st_size - 5)
    if kind == "older":
        older_file(memory, path, 2)

def die_at(number):
    def count(event, arguments=()):
        nonlocal number
        if event.startswith(("os.", "open", "fcntl.", "shutil.", "flush")) and event != "os.kill":
            number -= 1
            if number < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    fsync, write = os.fsync, os.write
    def half(descriptor, data):
        nonlocal number
        if number == 0:
            write(descriptor, data[: len(data) // 2])
        count("flush")
        return write(descriptor, data)
    os.fsync = lambda descriptor: (count("flush"), fsync(descriptor))
    os.write = half
    sys.addaudithook(count)

outcomes, kills, torn = set(), 0, 0
while True:
    prepare()
    old, _ = read()
    def work():
        die_at(kills)
        change(step)
    status = os.waitpid(forked(work), 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, status
    found, was_said = read()
    if kind == "forget":
        new = [old[0], *old[2:]]
    elif kind == "overwrite":
        new = [old[0], "fact 50", *old[2:]]
    else:
        new = [*old, f"fact {rows}"]
    assert found in (old, new), (kills, found)
    outcomes.add(found == new)
    torn += was_said
    go_on(found)
    path.unlink()
    if not killed:
        break
    kills += 1
print(kills, len(outcomes), torn)
"""
)


def run(program: str, *arguments: object) -> list[int]:
    """The numbers that a program prints."""
    command = [sys.executable, "-P", "-c", program, str(Path(__file__).parent), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return list(map(int, process.stdout.split()))


@pytest.mark.parametrize("kind", ["append", "fill", "torn", "older", "forget", "overwrite"])
def test_killed_before_any_call_the_file_is_old_or_new_and_the_next_writer_leaves_nothing(tmp_path, kind):
    kills, outcomes, torn = run(_EVERYWHERE, tmp_path, kind)
    assert kills > 8
    assert outcomes == 2
    assert (torn > 0) == (kind in ("append", "fill", "torn"))


# A writer appends rows and forgets some; it is killed after a random time. Each row is kept that was saved before.
_ANYTIME = (
    _COMMON
    + """
seed, kills = int(sys.argv[3]), int(sys.argv[4])
random.seed(seed)
save_memory(EpisodicMemory.empty(runtime), path, PRINT)
torn = 0
for kill in range(kills):
    def work():
        os.close(reader)
        with locked(path, wait_s=5):
            memory = load_memory(path, PRINT)
            memory.write_pending(runtime)
            number = 1000 * kill
            while True:
                if number % 7 == 6 and len(memory.entries) > 1:
                    memory.forget(runtime, len(memory.entries) - 2)
                else:
                    memory.write(runtime, entries(1, first=number)[0])
                store_memory(memory, path, PRINT)
                number += 1
                os.write(writer, b".")
    before, _ = read()
    reader, writer = os.pipe()
    process = forked(work)
    os.close(writer)
    time.sleep(random.uniform(0.001, 0.03))
    os.kill(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    saved = len(os.read(reader, 65536))
    os.close(reader)
    def after(steps):
        rows = list(before)
        for number in range(1000 * kill, 1000 * kill + steps):
            if number % 7 == 6 and len(rows) > 1:
                del rows[-2]
            else:
                rows.append(f"fact {number}")
        return rows
    found, was_said = read()
    assert found in (after(saved), after(saved + 1)), (seed, kill, saved, found[-5:], after(saved)[-5:])
    torn += was_said
    if kill % 20 == 19:
        go_on(found)
        change(lambda memory: memory.entries and memory.forget(runtime, len(memory.entries) - 1))
        with locked(path, wait_s=5):
            save_memory(EpisodicMemory.empty(runtime), path, PRINT)
print(kills, torn)
"""
)


def test_killed_at_200_random_moments_the_file_has_all_that_was_saved(tmp_path):
    assert run(_ANYTIME, tmp_path, 0, 200)[0] == 200
