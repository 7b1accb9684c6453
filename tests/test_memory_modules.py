"""The memory slot in the model: masked it is not there, seen it speaks, and gradients reach all that made it."""

import dataclasses

import pytest
import torch
from conftest import seeded_model, tiny_config
from test_decoder import random_slot

from microvlm.formats.weight_format import WeightFormat
from microvlm.model.lowering import lower
from microvlm.model.memory_algebra import MemoryState
from microvlm.model.memory_modules import MemoryProjection
from microvlm.model.microvlm import MicroVLM


def logits(model, slot, visible: int, requires_grad: bool = False) -> torch.Tensor:
    ids = torch.arange(14).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.set_grad_enabled(requires_grad):
        return model(model.embed(ids), mask, slot, torch.full((2,), visible))


@pytest.fixture(scope="module", params=["float", "ternary", "packed"])
def model(request, float_model, ternary_model):
    return {"float": float_model, "ternary": ternary_model}.get(request.param) or lower(
        ternary_model, WeightFormat()
    )


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_masked_slot_is_not_there_whatever_it_holds(model, scale, requires_grad):
    empty = logits(model, model.empty_slot(2), 0, requires_grad)
    assert torch.equal(logits(model, random_slot(model, 2, scale), 0, requires_grad), empty)
    assert torch.equal(logits(model, None, 0, requires_grad), empty)


def test_a_seen_slot_changes_the_logits_of_its_row_alone(model):
    masked = logits(model, random_slot(model, 2), 0)
    ids = torch.arange(14).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        mixed = model(model.embed(ids), mask, random_slot(model, 2), torch.tensor([0, 1]))
    assert torch.equal(mixed[0], masked[0])
    assert not torch.allclose(mixed[1, 2:], masked[1, 2:], atol=1e-3)


def episode_logits(model, fact_ids: torch.Tensor) -> torch.Tensor:
    """Write a fact, ask, read, and decode the question with what was read."""
    ones = torch.ones_like(fact_ids)
    latent, key = model.memory_encode(model.embed(fact_ids), ones)
    state = MemoryState(*model.memory_write(key, latent, *model.memory_prior_state()))
    question = torch.arange(40, 46)[None]
    query, query_key = model.memory_encode(model.embed(question), torch.ones_like(question))
    _, _, _, slot = model.memory_read(query_key, query, *state)
    return model(model.embed(question), torch.ones_like(question), slot)


def test_another_fact_in_the_memory_gives_other_logits(model):
    with torch.no_grad():
        first, second = (episode_logits(model, torch.arange(start, start + 5)[None]) for start in (100, 200))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["float", "ternary"])
def test_the_gradient_reaches_w_m_the_encoder_and_the_prior(kind, float_model, ternary_model):
    model = seeded_model({"float": float_model, "ternary": ternary_model}[kind].config).train()
    episode_logits(model, torch.arange(100, 105)[None]).square().sum().backward()
    reached = [
        model.memory_projection.linear.weight,
        model.memory_projection.linear.bias,
        model.memory_projection.readout.fc1.weight,
        model.memory_projection.readout.fc2.weight,
        model.memory_encoder.output.weight,
        model.memory_encoder.pool,
        model.memory_encoder.layers[0].self_attn.q_proj.weight,
        model.memory_encoder.layers[1].mlp.down_proj.weight,
        model.memory_prior,
    ]
    for parameter in reached:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def test_step_zero_is_the_base_model():
    """W_M starts with a value of zero and the key bias of k_proj: the slot takes weight and gives nothing."""
    model = seeded_model(tiny_config())
    fresh = MemoryProjection(model.config, lambda i, o, b: torch.nn.Linear(i, o, b))
    fresh.initialise_from(model.decoder.key_biases())
    slot = fresh(torch.zeros(1, 48))
    for (key, value), layer in zip(slot, model.decoder.layers, strict=True):
        assert not value.any()
        assert torch.equal(key.flatten(), layer.self_attn.k_proj.bias)


def test_a_readout_starts_as_the_identity_and_is_no_part_of_a_model_without_one():
    config = tiny_config()
    latent = torch.nn.functional.normalize(torch.randn(3, 48), dim=-1)
    fresh = MicroVLM(config).memory_projection
    assert torch.equal(fresh.readout(latent), latent)
    without = MicroVLM(dataclasses.replace(config, memory=dataclasses.replace(config.memory, readout_size=0)))
    assert without.memory_projection.readout is None
    assert not [name for name in without.state_dict() if "readout" in name]


def test_latents_have_unit_length_and_keys_are_their_addresses(model):
    ids = torch.randint(0, 300, (3, 6))
    with torch.no_grad():
        latent, key = model.memory_encode(model.embed(ids), torch.ones_like(ids))
        encoder = model.memory_encoder
    assert latent.shape == (3, 48)
    assert key.shape == (3, 16)
    torch.testing.assert_close(latent.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(key, latent @ encoder.pseudo_inverse)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_latent(float_model, side):
    torch.manual_seed(0)
    ids, padding = torch.randint(0, 300, (1, 5)), torch.randint(0, 300, (1, 3))
    order = slice(None, None, -1 if side == "left" else 1)
    masks = [torch.ones(1, 5, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)]
    with torch.no_grad():
        unpadded = float_model.memory_encode(float_model.embed(ids), masks[0])[0]
        padded = float_model.memory_encode(
            float_model.embed(torch.cat([ids, padding][order], 1)), torch.cat(masks[order], 1)
        )[0]
    torch.testing.assert_close(padded, unpadded, rtol=1e-5, atol=1e-6)


def test_the_encoder_reads_in_both_directions(float_model):
    ids = torch.randint(0, 300, (1, 5))
    changed_ids = ids.clone()
    changed_ids[0, -1] = (ids[0, -1] + 1) % 300
    first_rows = []
    hook = float_model.memory_encoder.norm.register_forward_hook(
        lambda m, i, out: first_rows.append(out[0, 0])
    )
    with torch.no_grad():
        for tokens in (ids, changed_ids):
            float_model.memory_encode(float_model.embed(tokens), torch.ones_like(ids))
    hook.remove()
    assert not torch.allclose(first_rows[0], first_rows[1])


def test_a_read_gives_scope_residual_and_a_slot_per_layer(model):
    latent = torch.nn.functional.normalize(torch.randn(2, 48), dim=-1)
    with torch.no_grad():
        key = latent @ model.memory_encoder.pseudo_inverse
        recalled, scope, residual, slot = model.memory_read(key, latent, *model.memory_reset(2))
    torch.testing.assert_close(residual, (recalled - latent).norm(dim=-1))
    assert ((scope > 0) & (scope < 1)).all()
    assert [tuple(part.shape) for part in slot[0]] == [(2, 1, 1, 32)] * 2
    assert len(slot) == 2


def test_reset_gives_the_learned_prior_without_a_gradient(float_model):
    state = float_model.memory_reset(3)
    assert torch.equal(state.mean[2], float_model.memory_prior)
    assert torch.equal(state.covariance[1], torch.eye(16))
    assert not state.mean.requires_grad
    assert float_model.memory_prior_state().mean.requires_grad
