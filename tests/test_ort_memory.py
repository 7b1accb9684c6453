"""A state held in ONNX Runtime: no step copies it, and a thousand steps are those of the PyTorch functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microvlm.backends import load
from microvlm.errors import UserError
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.model.memory_algebra import MemoryState, forget, prior, read, write
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.state_choice import state_for

SLOTS, WIDTH = 16, 48


@pytest.fixture(scope="module")
def runtime(tiny_bundle):
    return load("ort", tiny_bundle, threads=1)


def rows(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys as long as those of unit latents under a reference of orthonormal rows: |w|^2 = K / C on average."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        key, latent = rng.normal(size=(1, SLOTS)) / WIDTH**0.5, rng.normal(size=(1, WIDTH))
        pairs.append((key.astype(np.float32), (latent / np.linalg.norm(latent)).astype(np.float32)))
    return pairs


def addresses(state) -> tuple[int, ...]:
    return tuple(part.__array_interface__["data"][0] for part in state)


def test_steps_go_back_and_forth_between_two_buffers(runtime):
    start = runtime.memory_prior()
    held = runtime.hold_memory(start)
    places = [addresses(held.state)]
    for key, latent in rows(4):
        held.write(key, latent)
        places.append(addresses(held.state))
    assert places[0] == places[2] == places[4]
    assert places[1] == places[3] != places[0]
    assert addresses(start) not in places
    assert np.array_equal(start.mean, runtime.memory_prior().mean)


def test_a_held_state_is_bit_for_bit_that_of_the_functions(runtime):
    state = runtime.memory_prior()
    held = runtime.hold_memory(state)
    pairs = rows(6)
    for key, latent in pairs:
        state = runtime.memory_write(key, latent, state)
        held.write(key, latent)
    state = runtime.memory_forget(*pairs[2], state)
    held.forget(*pairs[2])
    for ours, theirs in zip(held.snapshot(), state, strict=True):
        assert np.array_equal(ours, theirs)
    first, second = held.read(*pairs[0]), held.read(*pairs[0])
    assert np.array_equal(first.latent, second.latent)
    assert np.array_equal(first.latent, runtime.memory_read(*pairs[0], state).latent)


def test_rows_of_another_type_or_order_are_converted_and_kept_until_they_are_read(runtime):
    held, plain = (runtime.hold_memory(runtime.memory_prior()) for _ in range(2))
    for key, latent in rows(20):
        plain.write(key, latent)
        wide, strided = key.astype(np.float64), np.repeat(latent, 2, axis=1)[:, ::2]
        held.write(wide, strided)
    for ours, theirs in zip(held.state, plain.state, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_snapshot_does_not_change_with_later_steps(runtime):
    held = runtime.hold_memory(runtime.memory_prior())
    first, second, third = rows(3)
    held.write(*first)
    snapshot = held.snapshot()
    copy = snapshot.mean.copy()
    held.write(*second)
    held.write(*third)
    assert np.array_equal(snapshot.mean, copy)
    assert not np.array_equal(held.state.mean, copy)


def test_a_thousand_random_steps_equal_the_pytorch_functions(runtime):
    """Float32 in both, so rounding alone separates them; float64 bounds the drift of either."""
    rng = np.random.default_rng(3)
    variance = runtime.config.memory.observation_variance
    start = runtime.memory_prior()
    held = runtime.hold_memory(start)
    single, double = (
        prior(torch.from_numpy(start.mean[0]).to(kind)) for kind in (torch.float32, torch.float64)
    )
    fresh, live, steps = iter(rows(1500, seed=5)), [], 0

    def step(name: str, operation, row) -> None:
        nonlocal single, double, steps
        getattr(held, name)(*row)
        tensors = [torch.from_numpy(part) for part in row]
        single = operation(single, *tensors, variance)
        double = operation(double, *(tensor.double() for tensor in tensors), variance)
        steps += 1

    while steps < 1000:
        draw = rng.random()
        if len(live) < SLOTS and (draw < 0.6 or not live):
            live.append(next(fresh))
            step("write", write, live[-1])
        elif draw < 0.8:
            step("forget", forget, live.pop(int(rng.integers(len(live)))))
        else:
            index = int(rng.integers(len(live)))
            step("forget", forget, live[index])
            live[index] = next(fresh)
            step("write", write, live[index])
    ours = MemoryState(*(torch.from_numpy(part) for part in held.snapshot()))
    for name in ("mean", "covariance"):
        assert (getattr(ours, name) - getattr(single, name)).abs().max() < 1e-2
        assert (getattr(ours, name).double() - getattr(double, name)).abs().max() < 1e-2
    for key, latent in live:
        reading = torch.from_numpy(held.read(key, latent).latent)
        assert (reading - read(single, torch.from_numpy(key))).abs().max() < 1e-2


def test_an_overwrite_is_two_steps_that_copy_nothing_and_a_failed_one_leaves_the_state(runtime, monkeypatch):
    first, second, third = rows(3)
    held = runtime.hold_memory(runtime.memory_prior())
    held.write(*first)
    before, place = held.snapshot(), addresses(held.state)
    run = runtime.run_bound

    def fail_to_write(graph, binding):
        run(graph, binding)
        if graph == "memory_write":
            raise UserError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "run_bound", fail_to_write)
        with pytest.raises(UserError, match="disk is gone"):
            held.overwrite(*first, *second)
    assert addresses(held.state) == place
    for ours, theirs in zip(held.state, before, strict=True):
        assert np.array_equal(ours, theirs)
    held.overwrite(*first, *second)
    state = runtime.memory_write(*second, runtime.memory_forget(*first, before))
    assert np.array_equal(held.state.mean, state.mean)
    places = {place, addresses(held.state)}
    for old, new in ((second, third), (third, first), (first, second), (second, third)):
        held.overwrite(*old, *new)
        places.add(addresses(held.state))
    assert len(places) == 3


def test_an_episode_on_onnx_runtime_steps_in_held_buffers_and_equals_the_functions(runtime, monkeypatch):
    """Every operation of the commands, beyond the slots too; the functions, which copy, are not called."""

    class Functions:
        """A runtime that holds no memory."""

        config, memory_prior = runtime.config, staticmethod(runtime.memory_prior)
        memory_write = staticmethod(runtime.memory_write)
        memory_forget = staticmethod(runtime.memory_forget)

    def operate(runtime) -> EpisodicMemory:
        memory = EpisodicMemory.empty(runtime)
        new_entries = [Entry(str(number), key[0], latent[0]) for number, (key, latent) in enumerate(rows(40))]
        for entry in new_entries[:20]:
            memory.write(runtime, entry)
        for number in range(20):
            memory.overwrite(runtime, number % 7, new_entries[20 + number])
        memory.forget(runtime, 3)
        memory.forget(runtime, 18)
        return memory

    def copies(*_):
        raise AssertionError("a function that copies the state was called")

    with monkeypatch.context() as patch:
        for name in ("memory_write", "memory_forget"):
            patch.setattr(runtime, name, copies)
        ours = operate(runtime)
    theirs = operate(Functions())
    assert len(ours.states) == len(theirs.states) == 2
    assert ours.forgotten == theirs.forgotten
    for our_state, their_state in zip(ours.states, theirs.states, strict=True):
        for our_array, their_array in zip(our_state, their_state, strict=True):
            assert np.array_equal(our_array, their_array)


def test_a_state_that_one_backend_held_is_taken_over_by_another(runtime, ternary_model):
    memory, torch_runtime = EpisodicMemory.empty(runtime), TorchRuntime(ternary_model)
    first, second, third = (Entry("", key[0], latent[0]) for key, latent in rows(3))
    memory.write(runtime, first)
    memory.write(torch_runtime, second)
    memory.write(runtime, third)
    expected = prior(torch.from_numpy(runtime.memory_prior().mean[0]))
    for entry in (first, second, third):
        expected = write(
            expected, *map(torch.from_numpy, entry.row), runtime.config.memory.observation_variance
        )
    assert np.abs(memory.states[0].mean - expected.mean.numpy()).max() < 1e-5


def test_one_question_reads_the_chosen_state_itself_and_several_get_theirs(runtime):
    states = [runtime.memory_prior() for _ in range(2)]
    (key, latent), (other_key, other_latent) = rows(2)
    states = [
        runtime.memory_write(key, latent, states[0]),
        runtime.memory_write(other_key, other_latent, states[1]),
    ]
    assert state_for(other_key, states) is states[1]
    state = state_for(np.concatenate([other_key, key]), states)
    assert np.array_equal(state.mean[0], states[1].mean[0])
    assert np.array_equal(state.mean[1], states[0].mean[0])
