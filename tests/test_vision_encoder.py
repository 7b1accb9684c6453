"""The vision encoder and the adapter: patches, tokens, pooling; transformers' equality is in test_hf_loading."""

import dataclasses

import pytest
import torch
from conftest import FLOAT, TERNARY, seeded_model, tiny_config

from microvlm.model.attention import attend, attention_weights
from microvlm.model.linear import Int8Linear, linear_factory
from microvlm.model.vision import VisionEncoder, normalise


def test_patches_are_flattened_channel_row_column():
    config = tiny_config(FLOAT).vision
    encoder = VisionEncoder(config, linear_factory(32))
    pixels = torch.randn(1, 3, 32, 32)
    inputs_seen = []
    encoder.patch_embedding.register_forward_hook(
        lambda module, inputs, output: inputs_seen.append(inputs[0])
    )
    encoder(pixels)
    # Patch 6 of 4 x 4 is row 1, column 2.
    assert torch.equal(inputs_seen[0][0, 6], pixels[0, :, 8:16, 16:24].flatten())


def test_a_patch_reaches_its_own_position_first(float_model):
    with torch.no_grad():
        pixels = torch.zeros(1, 3, 32, 32)
        plain = float_model.vision.patch_embedding(torch.zeros(1, 16, 192))
        pixels[0, :, 24:, 24:] = 1
        patches = pixels.reshape(1, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 192)
        changed = (float_model.vision.patch_embedding(patches) - plain).abs().amax(-1)[0] > 0
    assert changed.nonzero().flatten().tolist() == [15]


@pytest.mark.parametrize("distilled", [True, False])
def test_tokens_are_leading_then_patches(distilled):
    vision = dataclasses.replace(tiny_config().vision, distillation_token=distilled)
    encoder = VisionEncoder(vision, linear_factory(32))
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 16 + 1 + distilled, 48)
    assert hasattr(encoder, "distillation_token") == distilled


@pytest.mark.parametrize("quantization", [FLOAT, TERNARY], ids=["float", "int8"])
def test_every_vision_and_adapter_weight_gets_a_gradient(quantization):
    model = seeded_model(tiny_config(quantization)).train()
    model.encode_image(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for part in (model.vision, model.adapter):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            # A key bias shifts all scores of a query alike, so its gradient is zero but for rounding.
            assert parameter.grad.abs().max() > 0 or name.endswith("key.bias"), name


def test_int8_training_uses_int8_layers_everywhere_in_vision(ternary_model):
    for part in (ternary_model.vision, ternary_model.adapter):
        linears = [module for module in part.modules() if isinstance(module, torch.nn.Linear)]
        assert linears
        assert all(isinstance(module, Int8Linear) for module in linears)


def test_the_adapter_gives_k_prefixes_and_its_weights_sum_to_one(float_model):
    features = torch.randn(2, 18, 48)
    with torch.no_grad():
        assert float_model.adapter(features).shape == (2, 4, 64)
        weights = float_model.adapter.pooling_weights(features)
    assert weights.shape == (2, 4, 18)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))


def test_attention_with_and_without_gradients_is_the_same_product():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    fused = attend(query, key, value, mask)
    plain = attend(query.clone().requires_grad_(), key, value, mask)
    torch.testing.assert_close(fused, plain.detach(), rtol=1e-5, atol=1e-6)
    weights = attention_weights(query, key, mask)
    assert not weights.masked_select(~mask.expand_as(weights)).any()
    grouped = value.repeat_interleave(2, 1)
    torch.testing.assert_close(weights @ grouped, fused, rtol=1e-5, atol=1e-6)


def test_pixels_are_normalised_by_channel():
    config = dataclasses.replace(tiny_config().vision, image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 2.0))
    pixels = normalise(torch.ones(1, 3, 2, 2), config)
    assert pixels[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0]
