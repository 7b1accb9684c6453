"""The memory file: bit for bit there and back; refused when cut, altered, newer or of another model; never half."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from microvlm.errors import UserError
from microvlm.memory.conversation import Chat
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.memory_file import load_memory, save_memory
from microvlm.memory.memory_reader import digest_of
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.runtime import MemoryArrays

PRINT = "0123456789abcdef"


@pytest.fixture(scope="module")
def runtime(ternary_model) -> TorchRuntime:
    return TorchRuntime(ternary_model)


@pytest.fixture
def memory(runtime) -> EpisodicMemory:
    rng = np.random.default_rng(0)
    episodic = EpisodicMemory.empty(runtime)
    for number in range(2):
        key, latent = (rng.normal(size=size).astype(np.float32) / 4 for size in (16, 48))
        source = {"question": "qué?", "picture": "ab" * 32} if number else {}
        entry = Entry(f"fact {number}, naïve", key, latent, time=1e9 + number, image=number == 0, **source)
        episodic.write(runtime, entry)
    return episodic


def test_a_memory_comes_back_bit_for_bit_with_its_log(memory, tmp_path):
    save_memory(memory, tmp_path / "trip.mem", PRINT)
    loaded_memory = load_memory(tmp_path / "trip.mem", PRINT)
    for saved, read_back in zip(memory.states[0], loaded_memory.states[0], strict=True):
        assert np.array_equal(saved, read_back)
    assert loaded_memory.forgotten == memory.forgotten
    plain = [
        [(e.text, e.time, e.image, e.question, e.picture) for e in episodic.entries]
        for episodic in (memory, loaded_memory)
    ]
    assert plain[0] == plain[1]
    assert [row[3:] for row in plain[1]] == [(None, ""), ("qué?", "ab" * 32)]
    for saved, read_back in zip(memory.entries, loaded_memory.entries, strict=True):
        assert np.array_equal(saved.key, read_back.key)
        assert np.array_equal(saved.latent, read_back.latent)


def test_an_empty_memory_comes_back(runtime, tmp_path):
    save_memory(EpisodicMemory.empty(runtime), tmp_path / "new.mem", PRINT)
    assert load_memory(tmp_path / "new.mem", PRINT).entries == []


def test_the_log_rebuilds_the_state(memory, runtime):
    rebuilt_memory = EpisodicMemory.empty(runtime)
    for entry in memory.entries:
        rebuilt_memory.write(runtime, entry)
    assert np.array_equal(rebuilt_memory.states[0].mean, memory.states[0].mean)


def test_another_models_memory_is_refused(memory, tmp_path):
    save_memory(memory, tmp_path / "trip.mem", PRINT)
    with pytest.raises(UserError, match="written by another model"):
        load_memory(tmp_path / "trip.mem", "f" * 16)


@pytest.fixture
def small_file(tmp_path) -> tuple[Path, bytes]:
    """A memory of three slots with one row: small enough to try every byte."""
    rng = np.random.default_rng(1)
    state = MemoryArrays(rng.normal(size=(1, 3, 5)), np.eye(3)[None])
    entry = Entry("naïve", rng.normal(size=3), rng.normal(size=5), time=1e9)
    path = tmp_path / "small.mem"
    save_memory(EpisodicMemory([state], [entry], [7]), path, PRINT)
    assert load_memory(path, PRINT).entries[0].text == "naïve"
    assert load_memory(path, PRINT).forgotten == [7]
    return path, path.read_bytes()


def test_a_file_cut_at_any_byte_is_refused(small_file):
    path, content = small_file
    assert len(content) > 600
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged"):
            load_memory(path, PRINT)


def test_a_file_with_any_altered_byte_is_refused(small_file):
    path, content = small_file
    for at in range(len(content)):
        altered = bytearray(content)
        altered[at] ^= 1 << at % 8
        path.write_bytes(altered)
        with pytest.raises(UserError, match=r"damaged|newer microvlm"):
            load_memory(path, PRINT)


def test_a_file_with_bytes_behind_it_is_refused(small_file):
    path, content = small_file
    path.write_bytes(content + b"\1")
    with pytest.raises(UserError, match="damaged"):
        load_memory(path, PRINT)


@pytest.mark.posix
def test_a_killed_save_keeps_the_old_file(small_file):
    path, content = small_file
    killed = """
import os, signal, sys
from microvlm.memory.memory_file import read_memory, save_memory
memory, fingerprint = read_memory(sys.argv[1])
memory.entries.clear()
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
save_memory(memory, sys.argv[1], fingerprint)
"""
    process = subprocess.run([sys.executable, "-P", "-c", killed, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == content
    assert len(load_memory(path, PRINT).entries) == 1


def test_a_file_of_the_first_format_is_still_read(memory, tmp_path):
    path = tmp_path / "trip.mem"
    save_memory(memory, path, PRINT)
    tensors = load_file(path)
    tensors |= {name: tensors[name][0] for name in ("memory_mean", "memory_cov")}
    log = [{"text": e.text, "time": e.time, "image": e.image} for e in memory.entries]
    metadata = {"format": "1", "fingerprint": PRINT, "log": json.dumps(log)}
    save_file(tensors, path, metadata | {"sha256": digest_of(tensors, metadata).hex()})
    loaded_memory = load_memory(path, PRINT)
    assert np.array_equal(loaded_memory.states[0].covariance, memory.states[0].covariance)
    assert [entry.memory for entry in loaded_memory.entries] == [0, 0]


@pytest.mark.parametrize(
    ("field", "tensor"),
    [("cue", "log_cues"), ("picture_key", "log_picture_keys"), ("question_key", "log_question_keys")],
)
def test_what_is_known_of_a_query_comes_back_and_other_sizes_are_refused(memory, tmp_path, field, tensor):
    path = tmp_path / "trip.mem"
    array = np.arange(1, (memory.width if field == "cue" else memory.slots) + 1, dtype=np.float32)
    memory.entries[0] = dataclasses.replace(memory.entries[0], **{field: array}, value_start=2, told=False)
    save_memory(memory, path, PRINT)
    first, second = load_memory(path, PRINT).entries
    assert np.array_equal(getattr(first, field), array)
    assert (first.value_start, first.told, getattr(second, field), second.told) == (2, False, None, True)
    tensors = load_file(path)
    tensors[tensor] = tensors[tensor][:, 1:].copy()
    with safe_open(path, "np") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "sha256"}
    save_file(tensors, path, metadata | {"sha256": digest_of(tensors, metadata).hex()})
    with pytest.raises(UserError, match="damaged"):
        load_memory(path, PRINT)


def test_a_newer_format_is_refused(memory, tmp_path):
    path = tmp_path / "trip.mem"
    save_memory(memory, path, PRINT)
    save_file(load_file(path), path, metadata={"format": "5", "fingerprint": PRINT})
    with pytest.raises(UserError, match="newer microvlm"):
        load_memory(path, PRINT)


def test_a_missing_file_and_a_folder_are_one_sentence_each(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_memory(tmp_path / "none.mem", PRINT)
    with pytest.raises(UserError, match="Is a directory"):
        load_memory(tmp_path, PRINT)


def test_a_crash_while_saving_keeps_the_old_file(memory, tmp_path, monkeypatch):
    path = tmp_path / "trip.mem"
    save_memory(memory, path, PRINT)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"not saved: .*no space is left"):
        save_memory(memory, path, PRINT)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["trip.mem"]


def test_a_folder_that_is_not_there_is_one_sentence(memory, tmp_path):
    with pytest.raises(UserError, match=r"not saved: .*No such file"):
        save_memory(memory, tmp_path / "none" / "trip.mem", PRINT)


@pytest.mark.posix
def test_a_link_and_its_target_are_one_file(memory, runtime, tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "trip.mem", tmp_path / "link.mem"
    link.symlink_to(Path("real") / "trip.mem")
    save_memory(memory, link, PRINT)
    assert (link.is_symlink(), target.is_symlink()) == (True, False)
    assert len(load_memory(target, PRINT).entries) == 2
    save_memory(EpisodicMemory.empty(runtime), link, PRINT)
    assert len(load_memory(target, PRINT).entries) == len(load_memory(link, PRINT).entries) == 0
    assert (sorted(os.listdir(tmp_path)), os.listdir(target.parent)) == (["link.mem", "real"], ["trip.mem"])


@pytest.fixture
def umask():
    """027 while the test runs."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.posix
def test_a_save_keeps_the_permissions_and_a_new_file_has_the_umasks(memory, tmp_path, umask):
    path = tmp_path / "trip.mem"
    save_memory(memory, path, PRINT)
    assert path.stat().st_mode & 0o7777 == 0o640
    for mode in (0o664, 0o600, 0o444):
        path.chmod(mode)
        save_memory(memory, path, PRINT)
        assert path.stat().st_mode & 0o7777 == mode


@pytest.mark.posix
def test_a_pipe_and_a_device_are_one_sentence_and_are_left_alone(memory, tmp_path):
    pipe, link = tmp_path / "pipe.mem", tmp_path / "link.mem"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        with pytest.raises(UserError, match=f"{path.name} is a pipe or a device"):
            save_memory(memory, path, PRINT)
        # In another process, which can be stopped when it waits for somebody to write into the pipe.
        program = "import sys; from microvlm.memory.memory_file import read_memory; read_memory(sys.argv[1])"
        command = [sys.executable, "-P", "-c", program, str(path)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert f"UserError: {path} is a pipe or a device" in process.stderr
    assert sorted(os.listdir(tmp_path)) == ["link.mem", "pipe.mem"]
    assert pipe.is_fifo()


def test_each_turn_writes_one_row_and_a_new_picture_is_keyed_by_its_place(runtime, tiny_processor):
    from microvlm.memory.conversation import text_prompt
    from microvlm.memory.ordinal_questions import ordinal_question

    chat = Chat(runtime, tiny_processor)
    picture = np.full((20, 20, 3), 200, np.uint8)
    caption_prompt = runtime.config.prompt.caption_prompt
    chat.ask(caption_prompt, picture, new_image=True, label="a.png")
    chat.ask("what is this?", picture)
    first, second = chat.memory.entries
    assert first.image
    assert not second.image
    _, place_key = runtime.memory_encode(*text_prompt(runtime, tiny_processor, ordinal_question(0)))
    assert np.array_equal(first.key, place_key[0])
    assert not np.array_equal(second.key, first.key)
    assert (first.question, first.picture) == (ordinal_question(0), "")
    assert (second.question, len(second.picture)) == ("what is this?", 64)
    assert first.text == f"a.png: {caption_prompt} {first.value}"
    assert not first.told
    chat.reset()
    assert chat.memory.entries == []
    assert np.array_equal(chat.memory.states[0].mean, runtime.memory_prior().mean)


def test_a_question_about_a_new_picture_is_not_what_its_place_is_asked_for(runtime, tiny_processor):
    """The answer to "what colour is it?" once came back as what was in the first image."""
    chat = Chat(runtime, tiny_processor)
    picture = np.full((20, 20, 3), 200, np.uint8)
    turn = chat.ask("what colour is it?", picture, label="a.png")
    place, colour = chat.memory.entries
    caption = Chat(runtime, tiny_processor).ask(runtime.config.prompt.caption_prompt, picture).answer
    assert (place.question, place.value, place.image) == ("what was in the first image?", caption, True)
    assert (colour.question, colour.value, colour.image) == ("what colour is it?", turn.answer, False)


def test_a_question_without_a_picture_is_never_written_back(runtime, tiny_processor):
    chat = Chat(runtime, tiny_processor)
    for question in ("what is this?", "what was in the first image?"):
        turn = chat.ask(question)
        assert (turn.answer, turn.from_memory, turn.stored) == ("not in this memory", False, False)
    assert chat.memory.entries == []
    assert chat.ask("what is this?", np.zeros((9, 9, 3), np.uint8), new_image=True).stored
