"""Several memories are read as one: the key's posterior variance says which of them to ask."""

from __future__ import annotations

import numpy as np
import pytest

from microvlm.generation import Prompt, read_slot
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.runtime import MemoryArrays
from microvlm.state_choice import choose_memory, key_variance, state_for

SLOTS, WIDTH, VARIANCE = 32, 96, 0.01


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def facts(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys [N, K] of random unit latents under a fixed reference of orthonormal rows, and values [N, C]."""
    rng = np.random.default_rng(seed)
    reference = np.linalg.qr(rng.normal(size=(WIDTH, SLOTS)))[0]
    return unit(rng.normal(size=(count, WIDTH))) @ reference, unit(rng.normal(size=(count, WIDTH)))


def memory_of(keys: np.ndarray, latents: np.ndarray) -> MemoryArrays:
    covariance = np.linalg.inv(np.eye(SLOTS) + keys.T @ keys / VARIANCE)
    return MemoryArrays((covariance @ keys.T @ latents / VARIANCE)[None], covariance[None])


def test_the_variance_of_a_key_is_one_before_it_is_written_and_the_observations_after():
    keys, latents = facts(4)
    empty = MemoryArrays(np.zeros((1, SLOTS, WIDTH)), np.eye(SLOTS)[None])
    assert key_variance(keys, empty.covariance) == pytest.approx(1)
    lengths = (keys[:1] ** 2).sum()
    expected = VARIANCE / (lengths + VARIANCE)
    assert key_variance(keys[:1], memory_of(keys[:1], latents[:1]).covariance) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [SLOTS // 2, SLOTS])
def test_four_times_more_facts_than_slots_are_recalled_from_four_memories(rows):
    keys, latents = facts(4 * rows)
    states = [memory_of(keys[at : at + rows], latents[at : at + rows]) for at in range(0, 4 * rows, rows)]
    chosen = choose_memory(keys, states)
    assert (chosen == np.repeat(np.arange(4), rows)).mean() > 0.99
    readings = np.einsum("nk,nkc->nc", keys, state_for(keys, states).mean)
    assert ((unit(readings) @ latents.T).argmax(1) == np.arange(4 * rows)).mean() > 0.99


def test_one_memory_of_eight_times_its_slots_loses_many():
    keys, latents = facts(8 * SLOTS)
    single = keys @ memory_of(keys, latents).mean[0]
    assert ((unit(single) @ latents.T).argmax(1) == np.arange(8 * SLOTS)).mean() < 0.8


def test_an_empty_memory_is_never_asked_for_what_another_holds():
    keys, latents = facts(5)
    empty = MemoryArrays(np.zeros((1, SLOTS, WIDTH)), np.eye(SLOTS)[None])
    assert choose_memory(keys, [empty, memory_of(keys, latents), empty]).tolist() == [1] * 5


def test_a_prompt_reads_the_state_that_knows_it_row_by_row(ternary_model):
    runtime = TorchRuntime(ternary_model)
    rng = np.random.default_rng(1)
    embeds = rng.normal(size=(2, 5, 64)).astype(np.float32)
    prompt = Prompt(embeds, np.ones((2, 5), np.int64))
    latents, keys = runtime.memory_encode(*prompt)
    prior = runtime.memory_prior()
    states = [runtime.memory_write(keys[row : row + 1], latents[row : row + 1], prior) for row in (1, 0)]
    batch_reading = read_slot(runtime, prompt, states).reading
    for row, state in ((0, states[1]), (1, states[0])):
        single_reading = read_slot(runtime, Prompt(*(part[row : row + 1] for part in prompt)), state).reading
        assert np.allclose(batch_reading.latent[row], single_reading.latent[0], atol=1e-5)
        assert batch_reading.scope[row] == pytest.approx(single_reading.scope[0], abs=1e-5)
    assert np.array_equal(
        read_slot(runtime, prompt, states[:1]).reading.latent,
        read_slot(runtime, prompt, states[0]).reading.latent,
    )
