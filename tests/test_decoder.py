"""The decoder: cache, masks, positions and padding; transformers' equality is in test_hf_loading."""

import dataclasses

import pytest
import torch
from conftest import FLOAT, seeded_model, tiny_config

from microvlm.model.attention import rotary_tables, rotate
from microvlm.model.decoder import decoder_mask
from microvlm.model.microvlm import positions_of


def random_slot(model, batch: int, scale: float = 1.0, seed: int = 9):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.config.text.num_key_value_heads, 1, model.config.text.head_dim)
    layers = model.config.text.num_hidden_layers
    return [
        (torch.randn(shape, generator=generator) * scale, torch.randn(shape, generator=generator) * scale)
        for _ in range(layers)
    ]


@pytest.mark.parametrize("visible", [0, 1])
@pytest.mark.parametrize("split", [1, 4, 6])
def test_prefill_then_steps_equals_one_forward(float_model, split, visible):
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (2, 8))
    slot = random_slot(float_model, 2)
    with torch.no_grad():
        embeds = float_model.embed(ids)
        expected = float_model(embeds, torch.ones_like(ids), slot, torch.full((2,), visible))
        mask = torch.cat([torch.full((2, 1), visible), torch.ones(2, split, dtype=torch.int64)], 1)
        positions = torch.arange(1, 9).expand(2, -1)
        logits, past = float_model.decode(embeds[:, :split], mask, positions[:, :split], slot)
        steps = [logits]
        for step in range(split, 8):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            logits, past = float_model.decode(
                embeds[:, step : step + 1], mask, positions[:, step : step + 1], past
            )
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)
    assert past[1][0].shape == (2, 1, 9, 32)


def test_a_later_token_does_not_change_an_earlier_logit(float_model):
    ids = torch.randint(0, 300, (1, 6))
    changed_ids = ids.clone()
    changed_ids[0, 4] = (ids[0, 4] + 1) % 300
    mask = torch.ones_like(ids)
    with torch.no_grad():
        before = float_model(float_model.embed(ids), mask)
        after = float_model(float_model.embed(changed_ids), mask)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_only_the_last_logits_are_kept_when_asked(float_model):
    ids = torch.randint(0, 300, (2, 6))
    embeds, mask = float_model.embed(ids).detach(), torch.ones(2, 7, dtype=torch.int64)
    mask[:, 0] = 0
    arguments = (embeds, mask, torch.arange(1, 7).expand(2, -1), float_model.empty_slot(2))
    with torch.no_grad():
        everything, full_cache = float_model.decode(*arguments)
        for count in (1, 3, 6):
            logits, cache = float_model.decode(*arguments, torch.tensor(count))
            assert logits.shape == (2, count, 300)
            torch.testing.assert_close(logits, everything[:, -count:], rtol=1e-5, atol=1e-6)
            assert torch.equal(cache[0][0], full_cache[0][0])


def test_the_mask_is_causal_hides_padding_and_never_blinds_a_row():
    attention = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    mask = decoder_mask(attention, 4)
    assert mask.shape == (2, 1, 4, 5)
    # Columns: slot, then four tokens. The first row hides the slot and two tokens of padding.
    assert mask[0, 0].int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert mask.any(-1).all()


def test_positions_start_at_one_after_the_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_of(mask).tolist() == [[1, 1, 1, 2], [1, 2, 3, 3]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("visible", [0, 1])
def test_padding_on_either_side_changes_no_logit_of_a_real_token(float_model, side, visible):
    torch.manual_seed(1)
    ids = torch.randint(0, 300, (1, 5))
    slot, slot_mask = random_slot(float_model, 1), torch.tensor([visible])
    padding = torch.randint(0, 300, (1, 3))
    ones, zeros = torch.ones(1, 5, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    order = slice(None, None, -1 if side == "left" else 1)
    padded = torch.cat([ids, padding][order], 1)
    mask = torch.cat([ones, zeros][order], 1)
    with torch.no_grad():
        expected = float_model(float_model.embed(ids), ones, slot, slot_mask)
        actual = float_model(float_model.embed(padded), mask, slot, slot_mask)
    torch.testing.assert_close(actual[mask.bool()], expected[0], rtol=1e-5, atol=1e-5)
    assert actual.isfinite().all()


def test_a_row_of_nothing_but_padding_is_finite_with_and_without_gradients(ternary_model):
    ids, mask = torch.randint(0, 300, (2, 4)), torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    with torch.no_grad():
        assert ternary_model(ternary_model.embed(ids), mask).isfinite().all()
        assert all(
            part.isfinite().all() for part in ternary_model.memory_encode(ternary_model.embed(ids), mask)
        )
    embeds = ternary_model.embed(ids).detach().requires_grad_()
    ternary_model(embeds, mask).square().sum().backward()
    assert embeds.grad.isfinite().all()
    ternary_model.zero_grad(set_to_none=True)


def test_rotary_positions_are_relative():
    torch.manual_seed(2)
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)

    def score(at_query: int, at_key: int) -> torch.Tensor:
        tables = [rotary_tables(torch.tensor([[at]]), 16, 1e4) for at in (at_query, at_key)]
        return (rotate(query, *tables[0]) * rotate(key, *tables[1])).sum(-1)

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(7, 3), score(7, 4))
    assert torch.equal(rotate(query, *rotary_tables(torch.tensor([[0]]), 16, 1e4)), query)


def test_attention_maps_are_distributions_over_what_may_be_seen(float_model):
    ids = torch.randint(0, 300, (1, 5))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    arguments = (float_model.embed(ids), mask, torch.arange(1, 6)[None], float_model.empty_slot(1))
    maps = float_model.decoder.attention_maps(*arguments)
    assert len(maps) == 2
    for weights in maps:
        assert weights.shape == (1, 2, 5, 6)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5))
        assert not weights[..., 0].any()
        assert not weights[0, 0, :, 1:].triu(1).any()


def test_sub_norms_come_with_the_configuration():
    text = tiny_config(FLOAT).text
    for sub_norm, count in ((True, 2 * 4), (False, 2 * 2)):
        model = seeded_model(tiny_config(FLOAT, text=dataclasses.replace(text, sub_norm=sub_norm)))
        assert len([key for key in model.decoder.layers.state_dict() if "norm" in key]) == count
