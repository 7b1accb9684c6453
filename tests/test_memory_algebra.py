"""The memory is exact recursive least squares: writing, forgetting and reading against the batch solution."""

import math

import pytest
import torch
from conftest import tiny_config

from microvlm.model.memory_algebra import (
    MemoryState,
    address,
    addressing_kl,
    agreement,
    batch_solution,
    forget,
    memory_kl,
    pinv_newton_schulz,
    prior,
    read,
    reference_memory,
    write,
)

VARIANCE = 0.01


def rows(count: int, slots: int = 24, width: int = 40, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Prior mean [K, C], keys [E, K] of about unit length and unit latents [E, C]."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(slots, width, generator=generator, dtype=torch.float64) * 0.1
    keys = torch.randn(count, slots, generator=generator, dtype=torch.float64) / slots**0.5
    latents = torch.nn.functional.normalize(
        torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1
    )
    return mean.to(dtype), keys.to(dtype), latents.to(dtype)


def write_each(mean, keys, latents, order=None) -> MemoryState:
    state = prior(mean)
    for index in range(len(keys)) if order is None else order:
        state = write(state, keys[index : index + 1], latents[index : index + 1], VARIANCE)
    return state


def distance(a: MemoryState, b: MemoryState) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("count", [1, 12, 24, 60])
def test_writing_one_at_a_time_is_the_batch_solution(dtype, tolerance, count):
    mean, keys, latents = rows(count)
    expected = batch_solution(mean, keys, latents, VARIANCE)
    state = write_each(mean.to(dtype), keys.to(dtype), latents.to(dtype))
    assert state.mean.dtype == dtype
    assert distance(MemoryState(*(part.double() for part in state)), expected) < tolerance


def test_the_batch_solution_is_the_ridge_regression_of_its_definition():
    mean, keys, latents = rows(9)
    solution = batch_solution(mean, keys, latents, VARIANCE).mean[0].requires_grad_()
    loss = ((keys @ solution - latents).square().sum() / VARIANCE + (solution - mean).square().sum()) / 2
    (gradient,) = torch.autograd.grad(loss, solution)
    assert gradient.abs().max() < 1e-9


def test_several_memories_are_solved_at_once_and_rows_of_zeros_add_nothing():
    mean, keys, latents = rows(12)
    padded = [
        torch.stack([part, torch.cat([part[:5], torch.zeros_like(part[5:])])]) for part in (keys, latents)
    ]
    states = batch_solution(mean, *padded, VARIANCE)
    for place, count in enumerate((12, 5)):
        single_state = batch_solution(mean, keys[:count], latents[:count], VARIANCE)
        assert distance(MemoryState(*(part[place : place + 1] for part in states)), single_state) < 1e-12


def test_the_order_of_writing_does_not_matter():
    mean, keys, latents = rows(15)
    shuffled = torch.randperm(15, generator=torch.Generator().manual_seed(1)).tolist()
    assert distance(write_each(mean, keys, latents), write_each(mean, keys, latents, shuffled)) < 1e-10


@pytest.mark.parametrize("forgotten", [0, 3, 7])
def test_a_forgotten_row_was_never_written(forgotten):
    mean, keys, latents = rows(8)
    state = write_each(mean, keys, latents)
    key, latent = keys[forgotten : forgotten + 1], latents[forgotten : forgotten + 1]
    state = forget(state, key, latent, VARIANCE)
    other_rows = [index for index in range(8) if index != forgotten]
    assert distance(state, write_each(mean, keys, latents, other_rows)) < 1e-9


def test_forgetting_everything_is_the_prior_again():
    mean, keys, latents = rows(12)
    state = write_each(mean, keys, latents)
    for index in (5, 0, 11, 3, 1, 2, 10, 4, 9, 6, 8, 7):
        state = forget(state, keys[index : index + 1], latents[index : index + 1], VARIANCE)
    assert distance(state, prior(mean)) < 1e-9


def test_overwriting_leaves_only_the_new_latent():
    mean, keys, latents = rows(6)
    state = forget(write_each(mean, keys, latents), keys[2:3], latents[2:3], VARIANCE)
    new = torch.nn.functional.normalize(torch.ones(1, 40, dtype=torch.float64), dim=-1)
    state = write(state, keys[2:3], new, VARIANCE)
    replaced = latents.clone()
    replaced[2] = new
    assert distance(state, batch_solution(mean, keys, replaced, VARIANCE)) < 1e-9


def test_a_written_row_can_be_forgotten_with_a_positive_denominator():
    mean, keys, latents = rows(20)
    state = write_each(mean, keys, latents)
    denominators = VARIANCE - torch.einsum("ek,kj,ej->e", keys, state.covariance[0], keys)
    assert (denominators > 0).all()


def test_the_covariance_stays_symmetric_and_positive():
    mean, keys, latents = rows(60, dtype=torch.float32)
    covariance = write_each(mean, keys, latents).covariance[0]
    assert (covariance - covariance.T).abs().max() < 1e-5
    assert torch.linalg.eigvalsh(covariance.double()).min() > 0


def test_a_written_latent_is_read_back_and_a_stranger_is_not():
    mean, keys, latents = rows(10, slots=64, width=96)
    state = write_each(mean * 0, keys, latents)
    recalled = torch.cat([read(state, key[None]) for key in keys])
    assert ((recalled @ latents.T).argmax(1) == torch.arange(10)).all()
    assert (torch.nn.functional.cosine_similarity(recalled, latents) > 0.95).all()


def test_reading_twice_gives_the_same_bits_and_changes_nothing():
    mean, keys, latents = rows(10, dtype=torch.float32)
    state = write_each(mean, keys, latents)
    before = [part.clone() for part in state]
    first = read(state, keys[4:5])
    assert torch.equal(read(state, keys[4:5]), first)
    assert all(torch.equal(part, copy) for part, copy in zip(state, before, strict=True))


def test_rows_of_a_batch_are_memories_of_their_own():
    mean, keys, latents = rows(6, dtype=torch.float64)
    state = prior(mean, batch=2)
    for index in range(3):
        state = write(state, keys[[index, index + 3]], latents[[index, index + 3]], VARIANCE)
    for row, start in enumerate((0, 3)):
        single_state = write_each(mean, keys[start : start + 3], latents[start : start + 3])
        assert distance(MemoryState(*(part[row : row + 1] for part in state)), single_state) < 1e-12


def test_writing_does_not_touch_the_state_it_was_given():
    mean, keys, latents = rows(2)
    state = prior(mean)
    before = [part.clone() for part in state]
    write(state, keys[:1], latents[:1], VARIANCE)
    assert all(torch.equal(part, copy) for part, copy in zip(state, before, strict=True))


def test_hundreds_of_operations_at_full_size_drift_little_in_float32():
    """K = 512, C = 896: 200 writes and 60 forgets, the float32 state against the float64 one."""
    slots, width, count, forgotten_count = 512, 896, 200, 60
    generator = torch.Generator().manual_seed(2)
    pinv = torch.linalg.pinv(reference_memory(slots, width))
    latents = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)
    keys = address(latents, pinv)
    mean = torch.zeros(slots, width)
    state = prior(mean)
    for index in range(count):
        state = write(state, keys[index : index + 1], latents[index : index + 1], VARIANCE)
    for index in range(forgotten_count):
        state = forget(state, keys[index : index + 1], latents[index : index + 1], VARIANCE)
    exact = batch_solution(
        mean.double(), keys[forgotten_count:].double(), latents[forgotten_count:].double(), VARIANCE
    )
    assert (state.mean.double() - exact.mean).abs().max() < 1e-2
    recalled = read(state, keys)
    cosine = torch.nn.functional.cosine_similarity(recalled, latents)
    assert cosine[forgotten_count:].min() > cosine[:forgotten_count].max() + 0.1


def test_reference_rows_are_orthonormal_fixed_and_fewer_than_the_width():
    reference = reference_memory(16, 40)
    torch.testing.assert_close(reference @ reference.T, torch.eye(16), atol=1e-6, rtol=0)
    assert torch.equal(reference, reference_memory(16, 40))
    assert not torch.equal(reference, reference_memory(16, 40, seed=1))
    for slots in (40, 41):
        with pytest.raises(ValueError, match="fewer"):
            reference_memory(slots, 40)


def test_an_address_is_the_least_squares_key():
    reference = reference_memory(8, 20)
    latent = torch.randn(3, 20)
    key = address(latent, torch.linalg.pinv(reference))
    torch.testing.assert_close(
        key, torch.linalg.lstsq(reference.T, latent.T).solution.T, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("steps", [3, 15, 30])
@pytest.mark.parametrize("alpha", [5e-4, 1e-2])
def test_newton_schulz_recovers_what_its_formula_says(steps, alpha):
    torch.manual_seed(0)
    left_basis, right_basis = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q for _ in range(2))
    values = torch.logspace(-1, 1, 12, dtype=torch.float64)
    matrix = left_basis @ values.diag() @ right_basis
    estimate = pinv_newton_schulz(matrix, steps, alpha)
    recovered = (right_basis @ estimate @ left_basis).diagonal() * values
    expected = 1 - (1 - alpha * values**2) ** (2**steps)
    torch.testing.assert_close(recovered, expected, atol=1e-9, rtol=1e-9)


def test_newton_schulz_refuses_to_diverge():
    matrix = torch.eye(4) * 2.1
    with pytest.raises(ValueError, match="diverges"):
        pinv_newton_schulz(matrix, alpha=0.5)
    assert pinv_newton_schulz(torch.eye(4) * 1.9, steps=12, alpha=0.5).isfinite().all()


def test_memory_kl_is_that_of_matrix_gaussians():
    mean, keys, latents = rows(5, slots=4, width=6)
    state = write_each(mean, keys, latents)
    covariance = (state.covariance[0] + state.covariance[0].T) / 2
    # A matrix Gaussian with row covariance U and unit columns: C independent columns with covariance U each.
    posterior = torch.distributions.MultivariateNormal(state.mean[0].T, covariance)
    start = torch.distributions.MultivariateNormal(mean.T, torch.eye(4, dtype=torch.float64))
    expected = torch.distributions.kl_divergence(posterior, start).sum() / (4 * 6)
    torch.testing.assert_close(memory_kl(state, mean), expected)
    assert memory_kl(prior(mean), mean).item() == pytest.approx(0, abs=1e-12)


def test_addressing_kl_is_that_of_gaussians():
    torch.manual_seed(0)
    key, log_variance = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    posterior = torch.distributions.Normal(key, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(addressing_kl(key, log_variance), expected)
    zero = addressing_kl(torch.zeros(2, 3), torch.tensor(-6.0))
    assert zero.item() == pytest.approx(0.5 * (math.exp(-6) - 1 + 6))


def test_gradients_flow_through_writing_and_reading():
    mean, keys, latents = rows(3, slots=5, width=7)
    inputs = [part.clone().requires_grad_() for part in (mean, keys, latents)]

    def recall(mean, keys, latents):
        return read(write_each(mean, keys, latents), keys[1:2])

    assert torch.autograd.gradcheck(recall, inputs)


def test_the_tiny_model_reads_what_it_wrote(float_model):
    memory = tiny_config().memory
    torch.manual_seed(0)
    latents = torch.nn.functional.normalize(torch.randn(3, memory.code_size), dim=-1)
    keys = address(latents, float_model.memory_encoder.pseudo_inverse)
    state = float_model.memory_reset()
    for row in range(3):
        state = MemoryState(*float_model.memory_write(keys[row : row + 1], latents[row : row + 1], *state))
    before = read(state, keys[:1])
    state = MemoryState(*float_model.memory_forget(keys[:1], latents[:1], *state))
    after = read(state, keys[:1])
    assert (before - latents[:1]).norm() < 0.3 * (after - latents[:1]).norm()


def test_agreement_is_the_cosine_outside_of_the_space_of_keys():
    reference = reference_memory(16, 40).double()
    _, _, latents = rows(2, slots=16)
    inverse = torch.linalg.pinv(reference)
    outside = latents - address(latents, inverse) @ reference
    expected = torch.nn.functional.cosine_similarity(outside[:1], outside[1:])
    query, read_latent = latents[:1], 3 * latents[1:]
    similarity = agreement(query, read_latent, address(query, inverse), address(read_latent, inverse))
    assert similarity.item() == pytest.approx(expected.item(), abs=1e-6)
    # What differs inside of the space of keys alone agrees.
    other_latent = latents[:1] + torch.randn(1, 16, dtype=torch.float64) @ reference
    similarity = agreement(query, other_latent, address(query, inverse), address(other_latent, inverse))
    assert similarity.item() == pytest.approx(1, abs=1e-6)


def test_numbers_that_are_not_finite_make_a_loss_that_is_not():
    keys = torch.full((1, 2, 24), torch.nan)
    assert memory_kl(
        batch_solution(torch.zeros(24, 40), keys, torch.zeros(1, 2, 40), 0.1), torch.zeros(24, 40)
    ).isnan()


@pytest.mark.parametrize("threads", [1, 2])
def test_several_large_memories_have_the_gradients_of_one_each(threads):
    """256 slots and more: PyTorch 2.13 factors batches of such matrices by LU wrongly with two threads."""
    generator = torch.Generator().manual_seed(0)
    keys, latents = (torch.randn(4, 24, size, generator=generator) / 16 for size in (256, 300))
    keys.requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prior = torch.zeros(256, 300)
        together = batch_solution(prior, keys, latents, 0.1)
        (gradient,) = torch.autograd.grad(memory_kl(together, prior) + together.mean.square().sum(), keys)
    finally:
        torch.set_num_threads(before)
    for number in range(4):
        row = keys[number].detach().double().requires_grad_()
        state = batch_solution(prior.double(), row, latents[number].double(), 0.1)
        loss = memory_kl(state, prior.double()) / 4 + state.mean.square().sum()
        (expected,) = torch.autograd.grad(loss, row)
        torch.testing.assert_close(gradient[number].double(), expected, rtol=1e-3, atol=1e-4)
