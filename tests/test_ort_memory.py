"""A state held in ONNX Runtime: no step copies it, and a thousand steps are those of the PyTorch functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microvlm.backends import load
from microvlm.memory import MemoryState, forget, prior, read, write

SLOTS, WIDTH = 16, 48


@pytest.fixture(scope="module")
def runtime(tiny_bundle):
    return load("ort", tiny_bundle, threads=1)


def rows(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys as long as those of unit codes under a reference of orthonormal rows: |w|^2 = K / C on average."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        key, code = rng.normal(size=(1, SLOTS)) / WIDTH**0.5, rng.normal(size=(1, WIDTH))
        made.append((key.astype(np.float32), (code / np.linalg.norm(code)).astype(np.float32)))
    return made


def addresses(state) -> tuple[int, ...]:
    return tuple(part.__array_interface__["data"][0] for part in state)


def test_steps_go_back_and_forth_between_two_buffers(runtime):
    start = runtime.memory_prior()
    held = runtime.hold_memory(start)
    seen = [addresses(held.state)]
    for key, code in rows(4):
        held.write(key, code)
        seen.append(addresses(held.state))
    assert seen[0] == seen[2] == seen[4]
    assert seen[1] == seen[3] != seen[0]
    assert addresses(start) not in seen
    assert np.array_equal(start.mean, runtime.memory_prior().mean)


def test_a_held_state_is_bit_for_bit_that_of_the_functions(runtime):
    state = runtime.memory_prior()
    held = runtime.hold_memory(state)
    written = rows(6)
    for key, code in written:
        state = runtime.memory_write(key, code, state)
        held.write(key, code)
    state = runtime.memory_forget(*written[2], state)
    held.forget(*written[2])
    for ours, theirs in zip(held.snapshot(), state, strict=True):
        assert np.array_equal(ours, theirs)
    first, second = held.read(*written[0]), held.read(*written[0])
    assert np.array_equal(first.code, second.code)
    assert np.array_equal(first.code, runtime.memory_read(*written[0], state).code)


def test_rows_of_another_type_or_order_are_converted_and_kept_until_they_are_read(runtime):
    held, plain = (runtime.hold_memory(runtime.memory_prior()) for _ in range(2))
    for key, code in rows(20):
        plain.write(key, code)
        wide, strided = key.astype(np.float64), np.repeat(code, 2, axis=1)[:, ::2]
        held.write(wide, strided)
    for ours, theirs in zip(held.state, plain.state, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_snapshot_does_not_change_with_later_steps(runtime):
    held = runtime.hold_memory(runtime.memory_prior())
    first, second, third = rows(3)
    held.write(*first)
    kept = held.snapshot()
    copy = kept.mean.copy()
    held.write(*second)
    held.write(*third)
    assert np.array_equal(kept.mean, copy)
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
    for key, code in live:
        reading = torch.from_numpy(held.read(key, code).code)
        assert (reading - read(single, torch.from_numpy(key))).abs().max() < 1e-2
