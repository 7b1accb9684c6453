"""The mean colours of places behind the features of the convolutional encoder: bytes, tokens, exports, refusals."""

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import seeded_model, tiny_config
from test_convolutional_encoder import float_state, normalised, pictures, vision

from microvlm.backends import load
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters.bundle_writer import export
from microvlm.exporters.tracing import graph_of
from microvlm.formats.weight_format import WeightFormat
from microvlm.formats.weight_shapes import COLOUR_LAYERS, weight_shapes
from microvlm.model.convolution.efficientnet import COLOUR_STEP, EfficientNetLite
from microvlm.model.convolution.integer_ops import place_colours
from microvlm.model.linear import linear_factory
from microvlm.model.lowering import set_traced
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.efficientnet_weights import integer_tensors

SIDE = 128


@pytest.fixture(scope="module")
def encoders():
    """One with colours and one without, with the same weights."""
    plain, coloured = (
        EfficientNetLite(vision(colours=colours), linear_factory(32)).eval() for colours in (False, True)
    )
    tensors = integer_tensors(float_state(plain.config), plain.config, [pictures(8, SIDE)], "made here")
    for encoder in (plain, coloured):
        encoder.load_state_dict(tensors)
    return plain, coloured


def adversarial_pictures():
    """uint8 [N, 128, 128, 3]: ties at .5 below and above even bytes, one pixel beside a tie, the ends, noise."""
    rng = np.random.default_rng(0)
    ties = []
    for low in (0, 1, 2, 127, 128, 253, 254):
        for extra in (511, 512, 513):
            # Of each place's 1,024 pixels `extra` have the next byte, at places drawn at random.
            place = np.full(1024, low, np.uint8)
            place[:extra] += 1
            places = np.stack([rng.permutation(place) for _ in range(16 * 3)]).reshape(4, 4, 3, 32, 32)
            ties.append(places.transpose(0, 3, 1, 4, 2).reshape(SIDE, SIDE, 3))
    # The same sums from bytes far apart.
    far = np.zeros((16 * 3, 1024), np.uint8)
    for number, row in enumerate(far):
        row[: 4 * number] = 255
        row[4 * number : 4 * number + 2] = 2 * number + 1
    far = far.reshape(4, 4, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(SIDE, SIDE, 3)
    ends = [np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 255, np.uint8)]
    noise = rng.integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    return np.concatenate([np.stack([*ties, far, *ends]), noise, pictures(2, SIDE, seed=4)])


def expected_colours(images):
    """By whole numbers alone: the quotient of the sum and 1,024, rounded half to even."""
    cut = images.astype(np.int64).reshape(len(images), 4, 32, 4, 32, 3).sum((2, 4)).transpose(0, 3, 1, 2)
    quotient, rest = np.divmod(cut, 1024)
    return (quotient + ((rest > 512) | ((rest == 512) & (quotient % 2 == 1)))).astype(np.uint8)


class Features(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values):
        return self.encoder.features(pixel_values)


def test_colours_are_means_rounded_half_to_even_on_torch_and_onnx_runtime(encoders, tmp_path):
    plain, coloured = encoders
    images = adversarial_pictures()
    expected = expected_colours(images)
    assert {0, 2, 128, 254} <= set(expected[:-6].flatten().tolist())
    assert np.array_equal(place_colours(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy(), expected)
    set_traced(coloured, True)
    try:
        onnx_ir.save(
            graph_of(Features(coloured).eval(), torch.zeros(2, 3, SIDE, SIDE)), tmp_path / "graph.onnx"
        )
    finally:
        set_traced(coloured, False)
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    for threads in (images[:3], images):
        pixels = normalised(threads)
        (of_ort,) = session.run(None, {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            of_torch = coloured.features(pixels).numpy()
            without = plain.features(pixels).numpy()
        assert of_ort.dtype == np.uint8
        assert np.array_equal(of_ort, of_torch)
        assert np.array_equal(of_torch[:, 1280:], expected[: len(threads)])
        assert np.array_equal(of_torch[:, :1280], without)


def test_tokens_have_colours_between_features_and_classes(encoders):
    plain, coloured = encoders
    maps = torch.randint(
        0, 256, (2, 1283, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        tokens, without = coloured.tokens(maps), plain.tokens(maps[:, :1280])
        whole = coloured.whole_token(torch.nn.functional.avg_pool2d(maps.float(), 2).flatten(2).mT)
    behind = coloured.config.features_of_token
    assert behind == 4 * 1280
    assert coloured.config.colours_of_token == 12
    assert torch.equal(torch.cat([tokens[..., :behind], tokens[..., behind + 12 :]], -1), without)
    colours = tokens[..., behind : behind + 12].unflatten(-1, (4, 3))
    # The second cell of the third window is row 2, column 1; the fourth quarter is the lower right one.
    assert torch.equal(colours[1, 3, 1], (maps[1, 1280:, 2, 1].float() - 127) * COLOUR_STEP)
    assert torch.equal(colours[1, 0, 3], (maps[1, 1280:, 2:, 2:].float().mean((1, 2)) - 127) * COLOUR_STEP)
    torch.testing.assert_close(whole, tokens[:, :1])
    assert torch.equal(coloured.class_features(maps.float()), plain.class_features(maps[:, :1280].float()))


def test_a_new_adapter_does_not_see_colours_and_learns_them():
    config = tiny_config(vision=vision(name_pieces=2, colours=True), prefix_tokens=0)
    model = MicroVLM(config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == weight_shapes(config)
    without = MicroVLM(tiny_config(vision=vision(name_pieces=2), prefix_tokens=0))
    own = model.state_dict()
    without.load_state_dict({name: own[name] for name in without.state_dict()})
    pixels = normalised(pictures(2, SIDE, seed=1))
    prefix = model.encode_image(pixels)
    assert torch.equal(prefix, without.encode_image(pixels))
    prefix.square().sum().backward()
    for name in COLOUR_LAYERS:
        weight = model.get_submodule(name).weight
        assert not weight.detach().any()
        assert weight.grad.abs().sum() > 0


def test_an_exported_model_with_colours_is_the_same_model(encoders, tmp_path):
    config = tiny_config(vision=vision(name_pieces=2, colours=True), prefix_tokens=0)
    model = seeded_model(config)
    model.vision.load_state_dict(encoders[1].state_dict())
    with torch.no_grad():
        for number, name in enumerate(COLOUR_LAYERS):
            torch.nn.init.normal_(
                model.get_submodule(name).weight, std=0.5, generator=torch.Generator().manual_seed(number)
            )
    model.save_pretrained(tmp_path / "checkpoint")
    assert MicroVLMConfig.load(tmp_path / "checkpoint").vision.colours
    # It raises CheckFailed if a graph differs from torch.
    export(tmp_path / "checkpoint", tmp_path / "bundle", WeightFormat(), threads=1)
    images = adversarial_pictures()[[0, 1, -5, -1]]
    pixels = normalised(images).numpy()
    of_torch, of_ort = (load(name, tmp_path / "bundle").encode_image(pixels) for name in ("torch", "ort"))
    np.testing.assert_allclose(of_ort, of_torch, atol=1e-4)
    # Red and blue exchanged are another picture to it.
    other = load("ort", tmp_path / "bundle").encode_image(normalised(images[..., ::-1].copy()).numpy())
    assert np.abs(other - of_ort)[1:].max() > 0.01


def test_a_configuration_names_colours_only_where_there_are_some():
    config = tiny_config(vision=vision(colours=True), prefix_tokens=0)
    assert config.to_dict()["vision"]["colours"] is True
    assert MicroVLMConfig.from_dict(config.to_dict()) == config
    for without in (tiny_config(), tiny_config(vision=vision(), prefix_tokens=0)):
        assert "colours" not in without.to_dict()["vision"]
    with pytest.raises(UserError, match="'colours' must be false for a ViT"):
        vision(architecture="vit", hidden_size=192, num_classes=0, colours=True)
