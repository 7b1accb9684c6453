"""`microvlm memory plot`: the numbers and the picture of a memory file, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microvlm.commands.main import cli
from microvlm.commands.memory_picture import numbers_of
from microvlm.console import run_click
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.memory_file import read_memory, save_memory
from microvlm.runtime import MemoryArrays

SLOTS, WIDTH = 8, 4


def state(variance: float = 1.0) -> MemoryArrays:
    return MemoryArrays(
        np.zeros((1, SLOTS, WIDTH), np.float32), (variance * np.eye(SLOTS, dtype=np.float32))[None]
    )


def entry(text: str, key: list[float], memory: int = 0) -> Entry:
    padded = np.array([*key, *[0.0] * (SLOTS - len(key))], np.float32)
    return Entry(text, padded, np.zeros(WIDTH, np.float32), time=1.0, memory=memory, question="q")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two states: in the first facts 1 and 3 look alike, the second has one fact."""
    path = tmp_path / "facts.mem"
    entries = [
        entry("anna", [1.0, 0.0]),
        entry("b\x1ben", [0.0, -1.0]),
        entry("clara", [1.0, 0.1]),
        entry("dora", [0, 0, 1], memory=1),
    ]
    save_memory(EpisodicMemory([state(0.5), state()], entries), path, "0" * 16)
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        run_click(cli, ["memory", "plot", *arguments])
    return exit_info.value.code


def test_the_numbers_are_those_of_the_keys(file):
    numbers = numbers_of(read_memory(file)[0], 0)
    assert numbers.numbers == [1, 2, 3]
    assert numbers.most_alike()[0] == (1, 3, pytest.approx(1 / np.hypot(1, 0.1), abs=1e-5))
    assert numbers.cosines[0, 1] == 0
    # Of eight slots two are used, the one about twice as much as the other.
    p = np.array([2.0, 1.1]) / 3.1
    assert numbers.utilization == pytest.approx(np.exp(-(p * np.log(p)).sum()) / SLOTS, abs=1e-5)
    assert numbers.variance == pytest.approx(np.full(SLOTS, 0.5))
    one = numbers_of(read_memory(file)[0], 1)
    assert (one.numbers, one.utilization, one.most_alike()) == ([4], pytest.approx(1 / SLOTS), [])


def test_the_command_draws_and_says_the_same(file, tmp_path, capsys):
    target = tmp_path / "memory.png"
    before = file.read_bytes()
    assert run(str(file), "-o", str(target), "--memory", "1") == 0
    assert (
        capsys.readouterr().out
        == "3 facts over 8 slots, of which 24% are in use; most alike: 1 and 3 (cosine 0.9950)\n"
    )
    with Image.open(target) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(178, 24, 43), (33, 102, 172)} <= colours, "the largest and the smallest weight"
    assert run(str(file), "-o", str(target), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["memory"], document["entries"], document["slots"]) == (2, [4], SLOTS)
    assert document["mean_variance"] == pytest.approx(1.0)
    assert file.read_bytes() == before


def test_a_full_memory_of_the_full_size_fits_on_a_sheet(tmp_path):
    generator = np.random.default_rng(0)
    slots, count = 512, 512
    entries = [
        Entry(f"fact {i}", generator.normal(size=slots).astype(np.float32), np.zeros(2, np.float32), time=1.0)
        for i in range(count)
    ]
    arrays = MemoryArrays(np.zeros((1, slots, 2), np.float32), np.eye(slots, dtype=np.float32)[None])
    save_memory(EpisodicMemory([arrays], entries), tmp_path / "full.mem", "0" * 16)
    assert run(str(tmp_path / "full.mem"), "-o", str(tmp_path / "full.png")) == 0
    with Image.open(tmp_path / "full.png") as picture:
        assert max(picture.size) < 3200


def test_what_cannot_be_drawn_is_refused(file, tmp_path, capsys):
    def refusal(*arguments: str) -> str:
        assert run(*arguments) == 2
        return capsys.readouterr().err

    assert "is not a .png" in refusal(str(file), "-o", "memory.txt")
    assert "give 1 to 2" in refusal(str(file), "-o", str(tmp_path / "a.png"), "--memory", "3")
    empty = tmp_path / "empty.mem"
    save_memory(EpisodicMemory([state()], []), empty, "0" * 16)
    assert "holds no facts: write one" in refusal(str(empty), "-o", str(tmp_path / "a.png"))
    assert "nothing.mem" in refusal(str(tmp_path / "nothing.mem"), "-o", str(tmp_path / "a.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.mem", "facts.mem"]
