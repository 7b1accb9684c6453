"""Appending to a memory file: a row costs its own bytes, a torn last record is dropped and said, no other change is."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import files_below
from stepping_memory import PRINT, SLOTS, WIDTH, Stepping, counts_agree, entries, older_file, texts

from microvlm.errors import UserError
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.facts import FactMemory
from microvlm.memory.memory_file import load_memory, read_memory, save_memory, store_memory
from microvlm.memory.record_chain import MAGIC
from microvlm.memory.tensor_blob import HEADER_LIMIT
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.runtime import MemoryArrays


@pytest.fixture(scope="module")
def runtime(ternary_model) -> TorchRuntime:
    return TorchRuntime(ternary_model)


def appended(runtime: TorchRuntime, path: Path, count: int) -> tuple[EpisodicMemory, list[int]]:
    """A memory of `count` rows, each stored by itself, and the file's size before the first and after each."""
    memory = EpisodicMemory.empty(runtime)
    save_memory(memory, path, PRINT)
    sizes = [path.stat().st_size]
    for entry in entries(count):
        memory.write(runtime, entry)
        store_memory(memory, path, PRINT)
        sizes.append(path.stat().st_size)
    return memory, sizes


def read(path: Path) -> tuple[list[str], list[str]]:
    """The texts in a file and what was said about it."""
    sentences: list[str] = []
    memory, _ = read_memory(path, say=sentences.append)
    return texts(memory), sentences


def test_rows_are_appended_and_states_come_back_bit_for_bit(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    memory, _ = appended(runtime, path, 2 * SLOTS + 5)
    loaded_memory = load_memory(path, PRINT)
    assert loaded_memory.pending == list(range(2 * SLOTS, 2 * SLOTS + 5))
    with pytest.raises(RuntimeError, match="pending"):
        _ = loaded_memory.states
    loaded_memory.write_pending(runtime)
    assert loaded_memory.forgotten == memory.forgotten == [0, 0, 0]
    assert texts(loaded_memory) == texts(memory)
    for ours, theirs in zip(memory.states, loaded_memory.states, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))
    for ours, theirs in zip(memory.entries, loaded_memory.entries, strict=True):
        assert (ours.memory, ours.time, ours.question) == (theirs.memory, theirs.time, theirs.question)
        assert np.array_equal(ours.key, theirs.key)
        assert np.array_equal(ours.latent, theirs.latent)
    assert os.listdir(tmp_path) == ["trip.mem"]


def test_a_row_costs_its_own_bytes_and_a_filled_state_once(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    _, sizes = appended(runtime, path, 3 * SLOTS)
    added = np.diff(sizes)
    row = 4 * (SLOTS + WIDTH)
    state = SLOTS * row
    fills = np.arange(1, len(added) + 1) % SLOTS == 0
    assert row < added[~fills].min() <= added[~fills].max() < row + 500
    assert row + state < added[fills].min() <= added[fills].max() < row + state + 800


def test_what_is_in_the_file_is_not_written_again(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    memory, _ = appended(runtime, path, 3)
    before, status = path.read_bytes(), path.stat()
    store_memory(memory, path, PRINT)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    (row,) = entries(1, first=3)
    memory.write(runtime, row)
    store_memory(memory, path, PRINT)
    assert path.read_bytes()[: len(before)] == before
    assert path.stat().st_ino == status.st_ino


def test_many_rows_at_once_are_one_record(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    memory = EpisodicMemory.empty(runtime)
    save_memory(memory, path, PRINT)
    for row in entries(3 * SLOTS + 2):
        memory.write(runtime, row)
    store_memory(memory, path, PRINT)
    assert path.read_bytes().count(MAGIC) == 1
    loaded_memory = load_memory(path, PRINT)
    assert len(loaded_memory.pending) == 2
    loaded_memory.write_pending(runtime)
    assert np.array_equal(loaded_memory.states[3].mean, memory.states[3].mean)


@pytest.fixture
def small_file(tmp_path) -> tuple[Path, bytes, int]:
    """A file of three slots and one row to which two rows were appended, its bytes and where the last record begins."""
    rng = np.random.default_rng(1)

    def row(number: int) -> Entry:
        key, latent = (rng.normal(size=size).astype(np.float32) for size in (3, 5))
        return Entry(f"fact {number}", key, latent, time=1e9)

    class Still:
        """A runtime whose writes change nothing."""

        memory_write = staticmethod(lambda key, latent, state: state)

    state = MemoryArrays(rng.normal(size=(1, 3, 5)).astype(np.float32), np.eye(3, dtype=np.float32)[None])
    memory, path = EpisodicMemory([state], [row(0)]), tmp_path / "small.mem"
    save_memory(memory, path, PRINT)
    for number in (1, 2):
        begin = path.stat().st_size
        memory.write(Still(), row(number))
        store_memory(memory, path, PRINT)
    assert read(path) == (["fact 0", "fact 1", "fact 2"], [])
    return path, path.read_bytes(), begin


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """No writer lives in most of these tests."""
    monkeypatch.setattr("microvlm.memory.memory_file._BETWEEN_LOOKS_S", 0)


def test_a_file_cut_within_its_last_record_loses_that_record_and_says_so(small_file):
    path, content, begin = small_file
    for length in range(begin + 1, len(content)):
        path.write_bytes(content[:length])
        found, sentences = read(path)
        assert found == ["fact 0", "fact 1"]
        assert len(sentences) == 1
        assert re.fullmatch(
            r"\S+small\.mem: what was written last is lost, .*; 2 entries are whole", sentences[0]
        )


def test_a_file_cut_between_two_records_is_its_older_self(small_file):
    path, content, begin = small_file
    path.write_bytes(content[:begin])
    assert read(path) == (["fact 0", "fact 1"], [])


def test_a_file_cut_within_what_was_written_at_once_is_refused(small_file):
    path, content, _ = small_file
    for length in range(content.index(MAGIC)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged"):
            read(path)


def test_any_altered_byte_is_refused_in_the_last_record_too(small_file):
    path, content, _ = small_file
    for at in range(len(content)):
        altered = bytearray(content)
        altered[at] ^= 1 << at % 8
        path.write_bytes(altered)
        with pytest.raises(UserError, match=r"damaged|newer microvlm"):
            read(path)


def test_records_that_are_exchanged_repeated_or_left_out_are_refused(small_file):
    path, content, begin = small_file
    first = content.index(MAGIC)
    base, one, two = content[:first], content[first:begin], content[begin:]
    for altered in (base + two + one, base + two, base + one + one, base + one + two + two, content + b"\1"):
        path.write_bytes(altered)
        with pytest.raises(UserError, match="damaged"):
            read(path)


def test_blocks_that_a_power_failure_left_unwritten_are_a_torn_record(small_file):
    path, content, begin = small_file
    last = content[begin:]
    for torn in (
        bytes(len(last)),
        bytes(4096),
        last[:100] + bytes(len(last) - 100),
        last[:20] + bytes(len(last) - 20),
    ):
        path.write_bytes(content[:begin] + torn)
        found, sentences = read(path)
        assert (found, len(sentences)) == (["fact 0", "fact 1"], 1)
    # In front of another record it is none: nothing is appended behind a torn record.
    first = content.index(MAGIC)
    for altered in (content[:first] + bytes(begin - first) + last, content[:begin] + bytes(40) + last):
        path.write_bytes(altered)
        with pytest.raises(UserError, match="damaged"):
            read(path)


def test_any_number_of_unwritten_zeros_behind_the_last_record_is_a_torn_record(small_file):
    path, content, _ = small_file
    for tail in (b"", MAGIC[:3], MAGIC):
        for zeros in (*range(1, 41), 4096):
            path.write_bytes(content + tail + bytes(zeros))
            found, sentences = read(path)
            assert (found, len(sentences)) == (["fact 0", "fact 1", "fact 2"], 1)
    for zeros in range(41):
        path.write_bytes(content + bytes(zeros) + b"x")
        with pytest.raises(UserError, match="damaged"):
            read(path)


def test_the_next_save_writes_a_torn_file_anew(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    appended(runtime, path, 5)
    os.truncate(path, path.stat().st_size - 7)
    sentences: list[str] = []
    memory, _ = read_memory(path, say=sentences.append)
    assert len(sentences) == 1
    memory.write_pending(runtime)
    store_memory(memory, path, PRINT)
    assert MAGIC not in path.read_bytes()
    assert read(path) == ([f"fact {number}" for number in range(4)], [])


@pytest.mark.parametrize("change", ["forget", "overwrite", "rebuild"])
def test_any_other_change_writes_the_file_anew_without_what_was_forgotten(runtime, tmp_path, change):
    path = tmp_path / "trip.mem"
    appended(runtime, path, SLOTS + 3)
    memory = load_memory(path, PRINT)
    if change == "forget":
        memory.forget(runtime, 2)
    elif change == "overwrite":
        memory.overwrite(runtime, 2, entries(1, first=99)[0])
    else:
        memory.rebuild(runtime)
    store_memory(memory, path, PRINT)
    content = path.read_bytes()
    assert MAGIC not in content
    assert (b"fact 2" in content) == (change == "rebuild")
    assert os.listdir(tmp_path) == ["trip.mem"]
    loaded_memory = load_memory(path, PRINT)
    assert (loaded_memory.pending, loaded_memory.forgotten) == ([], memory.forgotten)
    for ours, theirs in zip(memory.states, loaded_memory.states, strict=True):
        assert np.array_equal(ours.mean, theirs.mean)
    loaded_memory.write(runtime, entries(1, first=77)[0])
    store_memory(loaded_memory, path, PRINT)
    assert path.read_bytes()[: len(content)] == content


def test_facts_of_any_length_together_can_be_forgotten(tmp_path):
    """The rows that one header has no room for are in records of the new file, which has every state as it was."""
    path, runtime = tmp_path / "trip.mem", Stepping()
    memory = EpisodicMemory.empty(runtime)
    save_memory(memory, path, PRINT)
    for row in entries(6):
        memory.write(runtime, dataclasses.replace(row, text=row.text[-1] + "\U0001f355" * 999_999))
        store_memory(memory, path, PRINT)
    assert path.stat().st_size > 0.8 * HEADER_LIMIT
    memory = load_memory(path, PRINT)
    memory.write_pending(runtime)
    memory.forget(runtime, 1)
    store_memory(memory, path, PRINT)
    content = path.read_bytes()
    assert content.count(MAGIC) == 1
    assert b"1\\\\ud83c" not in content
    memory = load_memory(path, PRINT)
    assert [text[0] for text in texts(memory)] == list("02345")
    assert memory.pending == []
    assert counts_agree(memory)


def long_file(path: Path, monkeypatch, count: int = SLOTS + 5) -> EpisodicMemory:
    """A memory that was written at once and whose logs have at most three rows each."""
    monkeypatch.setattr("microvlm.memory.log_rows.LONGEST_LOG", 400)
    memory, runtime = EpisodicMemory.empty(Stepping()), Stepping()
    for row in entries(count):
        memory.write(runtime, row)
    save_memory(memory, path, PRINT)
    return memory


def test_a_file_written_at_once_in_records_is_whole_and_is_appended_to(tmp_path, monkeypatch):
    path, runtime = tmp_path / "trip.mem", Stepping()
    written = long_file(path, monkeypatch)
    content = path.read_bytes()
    assert content.count(MAGIC) == 6
    for number in (70, 80):
        memory = load_memory(path, PRINT)
        memory.write(runtime, entries(1, first=number)[0])
        store_memory(memory, path, PRINT)
        assert path.read_bytes().startswith(content)
    memory = load_memory(path, PRINT)
    memory.write_pending(runtime)
    assert texts(memory) == [*texts(written), "fact 70", "fact 80"]
    assert counts_agree(memory)
    # New rows that are too long for one record write the file anew.
    for row in entries(4, first=90):
        memory.write(runtime, row)
    store_memory(memory, path, PRINT)
    assert not path.read_bytes().startswith(content)
    assert texts(load_memory(path, PRINT))[-4:] == ["fact 90", "fact 91", "fact 92", "fact 93"]


def test_a_file_written_at_once_in_records_is_refused_wherever_it_is_cut(tmp_path, monkeypatch):
    path = tmp_path / "trip.mem"
    long_file(path, monkeypatch, 7)
    content = path.read_bytes()
    begins = [match.start() for match in re.finditer(re.escape(MAGIC), content)]
    assert len(begins) == 2
    for length in (*begins, begins[-1] + 30, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged"):
            read(path)
    path.write_bytes(content.replace(b'"rows":"7"', b'"rows":"6"'))
    with pytest.raises(UserError, match="damaged"):
        read(path)


def test_a_text_is_as_long_as_it_is_in_the_file(tmp_path):
    """Half a character has six in the file, where a text has a greatest length."""
    path, runtime = tmp_path / "trip.mem", Stepping()
    memory, (row,) = EpisodicMemory.empty(runtime), entries(1)
    with pytest.raises(UserError, match="more than 1,000,000 characters"):
        memory.write(runtime, dataclasses.replace(row, text="\udcff" * 166_667))
    memory.write(runtime, dataclasses.replace(row, text="\udcff" * 166_666))
    save_memory(memory, path, PRINT)
    assert len(load_memory(path, PRINT).entries[0].text) == 999_996


def test_a_row_in_the_room_of_a_forgotten_one_joins_the_state_as_it_was(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    memory, _ = appended(runtime, path, 2 * SLOTS)
    memory.forget(runtime, 3)
    for row in entries(3, first=50):
        memory.write(runtime, row)
        store_memory(memory, path, PRINT)
    loaded_memory = load_memory(path, PRINT)
    loaded_memory.write_pending(runtime)
    assert [entry.memory for entry in loaded_memory.entries[-3:]] == [0, 2, 2]
    for ours, theirs in zip(memory.states, loaded_memory.states, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_a_file_that_changed_meanwhile_is_replaced_and_never_damaged(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    appended(runtime, path, 3)
    ours, theirs = (load_memory(path, PRINT) for _ in range(2))
    for memory, first in ((ours, 10), (theirs, 20)):
        memory.write(runtime, entries(1, first=first)[0])
        store_memory(memory, path, PRINT)
    assert read(path) == (["fact 0", "fact 1", "fact 2", "fact 20"], [])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    theirs.write(runtime, entries(1, first=30)[0])
    store_memory(theirs, path, PRINT)
    assert read(path)[0][-2:] == ["fact 20", "fact 30"]
    path.unlink()
    store_memory(theirs, path, PRINT)
    assert read(path)[0][-2:] == ["fact 20", "fact 30"]


def test_a_log_that_was_changed_by_hand_is_written_whole(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    memory, _ = appended(runtime, path, 3)
    memory.entries[1] = entries(1, first=8)[0]
    store_memory(memory, path, PRINT)
    assert read(path)[0] == ["fact 0", "fact 8", "fact 2"]


def test_another_file_gets_the_whole_memory(runtime, tmp_path):
    path, copy = tmp_path / "trip.mem", tmp_path / "copy.mem"
    memory, _ = appended(runtime, path, 3)
    store_memory(memory, copy, PRINT)
    assert read(copy) == read(path)
    assert MAGIC not in copy.read_bytes()


@pytest.mark.posix
def test_a_record_for_which_there_is_no_room_is_taken_back(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    memory, _ = appended(runtime, path, 3)
    before = path.read_bytes()
    memory.write(runtime, entries(1, first=3)[0])
    with (
        files_below(len(before) + 100),
        pytest.raises(UserError, match=r"memory was not saved: \S+ cannot be"),
    ):
        store_memory(memory, path, PRINT)
    assert path.read_bytes() == before
    store_memory(memory, path, PRINT)
    assert path.read_bytes()[: len(before)] == before
    assert read(path) == ([f"fact {number}" for number in range(4)], [])


@pytest.mark.parametrize("file_format", [1, 2, 3])
def test_the_first_save_writes_an_older_file_in_the_new_format(runtime, tmp_path, file_format):
    path = tmp_path / "trip.mem"
    memory = EpisodicMemory.empty(runtime)
    for row in entries(3):
        memory.write(runtime, row)
    older_file(memory, path, file_format)
    loaded_memory = load_memory(path, PRINT)
    assert np.array_equal(loaded_memory.states[0].mean, memory.states[0].mean)
    loaded_memory.write(runtime, entries(1, first=3)[0])
    store_memory(loaded_memory, path, PRINT)
    content = path.read_bytes()
    assert MAGIC not in content
    loaded_memory.write(runtime, entries(1, first=4)[0])
    store_memory(loaded_memory, path, PRINT)
    assert path.read_bytes()[: len(content)] == content
    assert read(path) == ([f"fact {number}" for number in range(5)], [])
    older_file(memory, path, file_format)
    path.write_bytes(path.read_bytes() + content[-1:])
    with pytest.raises(UserError, match="damaged"):
        read(path)


_APPEND = """
import sys, time
sys.path.insert(0, sys.argv[1])
from stepping_memory import PRINT, Stepping, entries
from microvlm.memory.memory_file import load_memory, store_memory
memory, runtime = load_memory(sys.argv[2], PRINT), Stepping()
for row in entries(200, first=1000):
    memory.write(runtime, row)
    store_memory(memory, sys.argv[2], PRINT)
    if len(memory.entries) % 30 == 0:
        memory.forget(runtime, 0)
    time.sleep(0.002)
print("done", flush=True)
"""


@pytest.mark.posix
def test_a_reader_without_the_lock_sees_whole_records_while_another_process_writes(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = tmp_path / "trip.mem"
    save_memory(EpisodicMemory.empty(Stepping()), path, PRINT)
    command = [sys.executable, "-P", "-c", _APPEND, str(Path(__file__).parent), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    lengths = []
    while process.poll() is None:
        found, sentences = read(path)
        assert sentences == []
        numbers = [int(text.split()[1]) for text in found]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        lengths.append(len(numbers))
    assert process.communicate()[0] == b"done\n"
    assert process.returncode == 0
    assert len(set(lengths)) > 10


def test_a_fact_is_appended_and_a_forgotten_ones_text_leaves_the_file(runtime, tiny_processor, tmp_path):
    runtime.fingerprint = PRINT
    facts, path = FactMemory(runtime, tiny_processor), tmp_path / "trip.mem"
    facts.write("a red heart", "what is this?")
    facts.save(path)
    before = path.read_bytes()
    facts.write("a blue heart", "what is this?")
    facts.save(path)
    assert path.read_bytes()[: len(before)] == before
    assert b"blue" in path.read_bytes()
    later = FactMemory(runtime, tiny_processor)
    later.load(path)
    assert np.array_equal(later.memory.states[0].mean, facts.memory.states[0].mean)
    later.forget(1)
    later.save(path)
    assert b"blue" not in path.read_bytes()
    later.overwrite("a green heart", "what is this?")
    later.save(path)
    assert b"red" not in path.read_bytes()
    assert b"green" in path.read_bytes()
    later.reset()
    later.save(path)
    assert b"heart" not in path.read_bytes()
    assert read(path) == ([], [])


def test_the_name_of_a_picture_that_is_no_text_is_kept_as_its_escape(runtime, tmp_path):
    path = tmp_path / "trip.mem"
    memory = EpisodicMemory.empty(runtime)
    (row,) = entries(1)
    object.__setattr__(row, "text", "a\udcff.png: anna \\ud800 ü 🍕")
    memory.write(runtime, row)
    save_memory(memory, path, PRINT)
    assert read(path)[0] == ["a\\udcff.png: anna \\ud800 ü 🍕"]
    older_file(memory, path, 2)
    assert read(path)[0] == ["a\\udcff.png: anna \\ud800 ü 🍕"]
