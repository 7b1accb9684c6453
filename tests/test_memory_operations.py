"""An episodic memory with its log: forget, overwrite, rebuild are exact, and a row beyond the slots opens a state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.model.memory_algebra import batch_solution, forget, prior, write
from microvlm.model.torch_runtime import TorchRuntime

SLOTS, WIDTH = 16, 48


@pytest.fixture(scope="module")
def runtime(ternary_model) -> TorchRuntime:
    return TorchRuntime(ternary_model)


def entries(count: int, seed: int = 0) -> list[Entry]:
    rng = np.random.default_rng(seed)
    keys, latents = rng.normal(size=(count, SLOTS)), rng.normal(size=(count, WIDTH))
    keys /= SLOTS**0.5
    latents /= np.linalg.norm(latents, axis=1, keepdims=True)
    rows = zip(keys.astype(np.float32), latents.astype(np.float32), strict=True)
    return [Entry(f"fact {number}", key, latent, time=number) for number, (key, latent) in enumerate(rows)]


def filled(runtime: TorchRuntime, rows: list[Entry]) -> EpisodicMemory:
    memory = EpisodicMemory.empty(runtime)
    for row in rows:
        memory.write(runtime, row)
    return memory


def distance(memory: EpisodicMemory, reference: EpisodicMemory) -> float:
    pairs = zip(memory.states, reference.states, strict=True)
    return max(
        float(np.abs(a - b).max()) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)
    )


def texts(memory: EpisodicMemory) -> list[str]:
    return [entry.text for entry in memory.entries]


def test_a_forgotten_row_leaves_state_and_log_as_if_never_written(runtime):
    rows = entries(8)
    memory = filled(runtime, rows)
    assert memory.forget(runtime, 3).text == "fact 3"
    expected = filled(runtime, rows[:3] + rows[4:])
    assert distance(memory, expected) < 1e-3
    assert texts(memory) == texts(expected)


def test_overwriting_is_the_new_row_in_the_old_ones_place(runtime):
    rows, (new,) = entries(6), entries(1, seed=9)
    memory = filled(runtime, rows)
    memory.overwrite(runtime, 2, new)
    expected = filled(runtime, [*rows[:2], new, *rows[3:]])
    assert distance(memory, expected) < 1e-3
    assert texts(memory) == texts(expected)


def test_an_overwrite_that_fails_leaves_the_old_row_in_state_and_log(runtime, monkeypatch):
    first, second, third = entries(3)
    memory = filled(runtime, [first, second])
    before, log = memory.states[0].mean.copy(), texts(memory)

    def full_disk(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "memory_write", full_disk)
        with pytest.raises(OSError, match="no space"):
            memory.overwrite(runtime, 0, third)
    assert np.array_equal(memory.states[0].mean, before)
    assert texts(memory) == log


def test_a_row_beyond_the_slots_opens_a_state_and_room_is_used_again(runtime):
    rows = entries(2 * SLOTS + 2)
    memory = filled(runtime, rows)
    assert [entry.memory for entry in memory.entries] == [0] * SLOTS + [1] * SLOTS + [2] * 2
    for number in range(3):
        single_memory = EpisodicMemory.empty(runtime)
        for row in rows[number * SLOTS : (number + 1) * SLOTS]:
            single_memory.write(runtime, row)
        assert np.array_equal(memory.states[number].mean, single_memory.states[0].mean)
    memory.forget(runtime, 5)
    assert memory.write(runtime, entries(1, seed=3)[0]).memory == 0
    assert len(memory.states) == 3


def test_the_nearest_row_of_the_log_is_the_newest_of_equals(runtime):
    rows = entries(4)
    memory = filled(runtime, [*rows, rows[1]])
    index, cosine = memory.nearest(3 * rows[1].key)
    assert (index, round(cosine, 5)) == (4, 1)
    assert memory.nearest(3 * rows[1].key, [0, 1])[0] == 1
    assert memory.nearest(rows[1].key, []) == (-1, 0.0)
    assert EpisodicMemory.empty(runtime).nearest(rows[0].key) == (-1, 0.0)


def test_a_state_is_built_anew_after_as_many_forgotten_rows_as_it_has_slots(runtime):
    rows = entries(2 * SLOTS)
    memory = filled(runtime, rows[:2])
    for number in range(2, SLOTS + 1):
        memory.overwrite(runtime, 1, rows[number])
    assert memory.forgotten == [SLOTS - 1]
    assert distance(memory, filled(runtime, memory.entries)) > 0
    memory.overwrite(runtime, 1, rows[-1])
    assert memory.forgotten == [0]
    assert distance(memory, filled(runtime, memory.entries)) == 0


def test_after_a_thousand_mixed_operations_float32_is_near_float64_and_a_rebuild_restores_it(runtime):
    rng = np.random.default_rng(2)
    fresh = iter(entries(1200, seed=4))
    variance = runtime.config.memory.observation_variance
    memory = EpisodicMemory.empty(runtime)
    exact = prior(torch.from_numpy(runtime.memory_prior().mean[0]).double())

    def followed(state, operation, entry):
        key, latent = (torch.from_numpy(part)[None].double() for part in (entry.key, entry.latent))
        return operation(state, key, latent, variance)

    for _ in range(1000):
        draw, count = rng.random(), len(memory.entries)
        if count < SLOTS and (draw < 0.6 or count == 0):
            exact = followed(exact, write, memory.write(runtime, next(fresh)))
        elif draw < 0.8:
            exact = followed(exact, forget, memory.forget(runtime, int(rng.integers(count))))
        else:
            index, new = int(rng.integers(count)), next(fresh)
            exact = followed(followed(exact, forget, memory.entries[index]), write, new)
            memory.overwrite(runtime, index, new)
    mean, covariance = (part.numpy() for part in exact)
    assert np.abs(memory.states[0].mean - mean).max() < 1e-2
    assert np.abs(memory.states[0].covariance - covariance).max() < 1e-2
    drift = memory.rebuild(runtime)
    assert drift < 1e-2
    assert distance(memory, filled(runtime, memory.entries)) == 0
    keys, latents = (
        torch.from_numpy(np.stack([getattr(e, part) for e in memory.entries])) for part in ("key", "latent")
    )
    start = torch.from_numpy(runtime.memory_prior().mean[0])
    batch = batch_solution(start.double(), keys.double(), latents.double(), variance)
    assert np.abs(memory.states[0].mean - batch.mean.numpy()).max() < 1e-4
