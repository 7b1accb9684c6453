"""The assembled model: images in the prompt, batches, presets at their real widths, devices."""

import dataclasses

import pytest
import torch
from conftest import FLOAT, TERNARY, seeded_model, tiny_config

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.linear import TernaryLinear
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM
from microvlm.presets import preset

IMAGE = 299


def test_image_tokens_are_replaced_in_order(float_model):
    ids = torch.randint(0, 290, (2, 10))
    ids[0, 1:5], ids[1, 0:4], ids[1, 6:10] = IMAGE, IMAGE, IMAGE
    prefixes = torch.randn(3, 4, 64)
    with torch.no_grad():
        embeds = float_model.place_images(ids, IMAGE, prefixes)
        plain = float_model.embed(ids)
    assert torch.equal(embeds[0, 1:5], prefixes[0])
    assert torch.equal(embeds[1, 0:4], prefixes[1])
    assert torch.equal(embeds[1, 6:10], prefixes[2])
    assert torch.equal(embeds[ids != IMAGE], plain[ids != IMAGE])


@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_prompt_whose_image_tokens_do_not_match_its_images_is_refused(float_model, count):
    ids = torch.randint(0, 290, (1, 10))
    ids[0, :count] = IMAGE
    with pytest.raises(ValueError, match=f"{count} image tokens"):
        float_model.place_images(ids, IMAGE, torch.randn(1, 4, 64))


def test_gradients_pass_through_placed_images_to_pixels():
    model = seeded_model(tiny_config(TERNARY)).train()
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    ids = torch.tensor([[IMAGE] * 4 + [5, 6, 7]])
    embeds = model.place_images(ids, IMAGE, model.encode_image(pixels))
    model(embeds, torch.ones_like(ids))[0, -1, 3].backward()
    assert pixels.grad.abs().max() > 0
    assert model.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("quantization", [FLOAT, TERNARY], ids=["float", "ternary"])
def test_rows_of_a_batch_do_not_see_each_other(quantization):
    model = seeded_model(tiny_config(quantization))
    torch.manual_seed(0)
    ids, pixels = torch.randint(0, 290, (3, 9)), torch.randn(3, 3, 32, 32)
    ids[:, :4] = IMAGE
    other_ids, other_pixels = ids.clone(), pixels.clone()
    other_ids[1, 4:], other_pixels[1] = 7, 0.5
    mask = torch.ones_like(ids)
    with torch.no_grad():
        outputs = [
            model(model.place_images(tokens, IMAGE, model.encode_image(image)), mask)
            for tokens, image in ((ids, pixels), (other_ids, other_pixels))
        ]
    assert torch.equal(outputs[0][[0, 2]], outputs[1][[0, 2]])
    assert not torch.equal(outputs[0][1], outputs[1][1])


def test_wanted_positions_give_the_logits_of_a_full_forward(float_model):
    ids = torch.randint(0, 300, (2, 6))
    positions = torch.rand(2, 6) > 0.5
    with torch.no_grad():
        everything = float_model(float_model.embed(ids), torch.ones_like(ids))
        logits = float_model(float_model.embed(ids), torch.ones_like(ids), logits_mask=positions)
    torch.testing.assert_close(logits, everything[positions], rtol=1e-5, atol=1e-6)


def train_step(config: MicroVLMConfig) -> MicroVLM:
    """One forward and backward over image, text and memory, with random weights; every gradient finite."""
    torch.manual_seed(0)
    model = MicroVLM(config)
    side, vocabulary, k = config.vision.image_size, config.text.vocab_size, config.prefix_tokens
    ids = torch.randint(0, vocabulary - 1, (1, k + 4))
    ids[0, :k] = vocabulary - 1
    mask = torch.ones_like(ids)
    embeds = model.place_images(ids, vocabulary - 1, model.encode_image(torch.randn(1, 3, side, side)))
    latent, key = model.memory_encode(embeds, mask)
    state = model.memory_write(key, latent, *model.memory_prior_state())
    _, scope, _, slot = model.memory_read(key, latent, *state)
    logits = model(embeds, mask, slot)
    assert logits.shape == (1, k + 4, vocabulary)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) - scope.log().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return model.eval()


def shrunk(name: str, ternary: bool) -> MicroVLMConfig:
    """A preset with all its widths, and two layers and 512 words in place of its depth and vocabulary."""
    config = preset(name)
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_hidden_layers=2),
        text=dataclasses.replace(config.text, num_hidden_layers=2, vocab_size=512, sub_norm=ternary),
        memory=dataclasses.replace(config.memory, encoder_layers=1),
        quantization=TERNARY if ternary else FLOAT,
    )


@pytest.mark.parametrize(("name", "ternary"), [("small", False), ("full", True)])
def test_the_widths_of_the_large_presets_train_and_lower(name, ternary):
    model = train_step(shrunk(name, ternary))
    if ternary:
        ids = torch.randint(0, 512, (1, 3))
        lowered = lower(model, WeightFormat(1.58, "base3"))
        with torch.no_grad():
            embeds, mask = model.embed(ids), torch.ones_like(ids)
            assert torch.equal(lowered(lowered.embed(ids), mask), model(embeds, mask))


def test_nano_trains_a_step():
    model = train_step(preset("nano"))
    assert isinstance(model.decoder.layers[0].mlp.up_proj, TernaryLinear)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "full"])
def test_a_large_preset_trains_a_step_at_full_depth(name):
    model = train_step(preset(name))
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    if name == "full":
        assert counts["decoder"] + counts["embedding"] == 494_032_768
        # A linear over patches counts as the convolution does; DeiT-Tiny's classifier is not part of it.
        assert counts["vision"] == 5_524_416
        assert counts["memory_projection"] == 896 * 6144 + 6144


def test_the_exact_counts_of_qwen_and_deit_without_building_them():
    with torch.device("meta"):
        from microvlm.model.decoder import Decoder
        from microvlm.model.linear import linear_factory
        from microvlm.model.vision import VisionEncoder

        full = preset("full")
        decoder = Decoder(full.text, linear_factory(32))
        vision = VisionEncoder(full.vision, linear_factory(32))
    linears = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear))
    total = sum(p.numel() for p in decoder.parameters())
    assert linears == 357_826_560
    assert total - linears == 71_552
    assert total + full.text.vocab_size * full.text.hidden_size == 494_032_768
    assert sum(p.numel() for p in vision.parameters()) == 5_524_416


def test_an_unknown_device_is_a_sentence(tmp_path, float_model):
    float_model.save_pretrained(tmp_path / "model")
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for device in ("abacus", missing):
        with pytest.raises(UserError, match=f"'{device}' is not available"):
            MicroVLM.from_pretrained(tmp_path / "model", device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_logits_of_the_cpu(tmp_path, ternary_model):
    ternary_model.save_pretrained(tmp_path / "model")
    cuda_model = MicroVLM.from_pretrained(tmp_path / "model", device="cuda")
    ids = torch.randint(0, 300, (2, 6))
    with torch.no_grad():
        expected = ternary_model(ternary_model.embed(ids), torch.ones_like(ids))
        actual = cuda_model(cuda_model.embed(ids.cuda()), torch.ones_like(ids).cuda()).cpu()
        lowered = lower(cuda_model, WeightFormat())
        packed = lowered(lowered.embed(ids.cuda()), torch.ones_like(ids).cuda()).cpu()
    # Norms and attention round otherwise on another device; an int8 activation at a tie may then differ by 1.
    for logits in (actual, packed):
        assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
        assert (logits - expected).abs().mean() < 0.05
