"""The convolutional encoder: float weights folded, whole numbers exact in torch and ONNX Runtime, tokens."""

import dataclasses

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import seeded_model, tiny_config
from torch.nn import functional as F

from microvlm.backends import load
from microvlm.config import MicroVLMConfig, VisionConfig
from microvlm.errors import UserError
from microvlm.exporters.bundle_writer import export
from microvlm.exporters.tracing import graph_of
from microvlm.formats.encoders.efficientnet_lite import blocks, convolutions, same_padding
from microvlm.formats.weight_format import WeightFormat
from microvlm.formats.weight_shapes import weight_shapes
from microvlm.model.adapter import GridAdapter
from microvlm.model.convolution.efficientnet import POSTERIOR_SCALE, EfficientNetLite, pooling_matrix
from microvlm.model.convolution.integer_ops import (
    integer_convolution_eager,
    integer_sum_eager,
    pixel_bytes_eager,
)
from microvlm.model.linear import linear_factory
from microvlm.model.lowering import set_traced
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.efficientnet_weights import PIXEL_SCALE, fold, integer_tensors, package_names
from microvlm.presets import preset

MEAN, DEVIATION = (127 / 255,) * 3, (128 / 255,) * 3


def vision(**changes):
    sizes = {
        "architecture": "efficientnet-lite", "image_size": 128, "patch_size": 64, "hidden_size": 1280,
        "num_attention_heads": 1, "width_multiplier": 0.25, "depth_multiplier": 0.34, "num_classes": 10,
        "image_mean": MEAN, "image_std": DEVIATION,
    }  # fmt: skip
    return VisionConfig(**{**sizes, **changes})


def float_state(config, seed=0):
    """Random float weights with the package's names, and sensible statistics of batch normalization."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for sizes in convolutions(config.width_multiplier, config.depth_multiplier):
        convolution, norm = package_names(sizes.name)
        fan = float(np.prod(sizes.weight_shape[1:]))
        state[f"{convolution}.weight"] = (
            torch.randn(sizes.weight_shape, generator=generator) * (2 / fan) ** 0.5
        )
        state[f"{norm}.weight"] = torch.rand(sizes.outputs, generator=generator) + 0.5
        state[f"{norm}.bias"] = torch.randn(sizes.outputs, generator=generator) * 0.3 + 0.3
        state[f"{norm}.running_mean"] = torch.randn(sizes.outputs, generator=generator) * 0.1
        state[f"{norm}.running_var"] = torch.rand(sizes.outputs, generator=generator) + 0.5
    state["_fc.weight"] = torch.randn(config.num_classes, 1280, generator=generator) * 0.05
    state["_fc.bias"] = torch.randn(config.num_classes, generator=generator) * 0.1
    return state


def pictures(count, side, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(side // 8, 1).repeat(side // 8, 2)


def normalised(images):
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN[0]) / DEVIATION[0]


@pytest.fixture(scope="module")
def encoder():
    config = vision()
    tensors = integer_tensors(float_state(config), config, [pictures(8, 128)], "made here")
    made = EfficientNetLite(config, linear_factory(32))
    made.load_state_dict(tensors)
    return made.eval()


def test_lite0_has_the_published_size():
    # 4.65 M parameters with the classifier: Lite0 without batch normalization's statistics.
    weights = sum(int(np.prod(c.weight_shape)) + 2 * c.outputs for c in convolutions(1.0, 1.0))
    assert weights + 1280 * 1000 + 1000 == 4_652_008
    assert len(blocks(1.0, 1.0)) == 16
    assert len(blocks(1.1, 1.2)) == 21


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (256, 3, 2, (0, 1)),
        (64, 5, 2, (1, 2)),
        (7, 3, 2, (1, 1)),
        (8, 3, 1, (1, 1)),
        (8, 5, 1, (2, 2)),
        (8, 1, 1, (0, 0)),
    ],
)
def test_same_padding_is_tensorflows(size, kernel, stride, padding):
    assert same_padding(size, kernel, stride) == padding


def test_folded_weights_compute_what_the_package_computes():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    config = vision(image_size=256, width_multiplier=1.0, depth_multiplier=1.0, num_classes=1000)
    layers = fold(network.state_dict(), config, "the package")
    x = torch.randn(1, 3, 256, 256, generator=generator)
    with torch.no_grad():
        expected = network.extract_features(x)
        y = layers["stem"](x)
        for block in blocks(1.0, 1.0):
            before = y
            for sizes in block.convolutions:
                y = layers[sizes.name](y)
            y = y + before if block.has_shortcut else y
        torch.testing.assert_close(layers["head"](y), expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_is_the_integer_sum_times_its_multiplier():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 6, 9, 9), dtype=np.uint8)
    weight = rng.integers(1, 256, (4, 3, 3, 3), dtype=np.uint8)
    bias = rng.integers(-5000, 5000, 4).astype(np.int32)
    weight_scale = rng.uniform(0.001, 0.01, 4).astype(np.float32)
    scales = np.float32(0.03), np.float32(0.4)
    y = integer_convolution_eager(
        *map(torch.from_numpy, (x, np.array(scales[0]), weight, weight_scale, np.array(scales[1]), bias)),
        7, 128, [0, 0, 1, 1], 2, 2,
    )  # fmt: skip
    padded = np.full((2, 6, 10, 10), 7, np.int64)
    padded[:, :, :9, :9] = x
    centred, q = padded - 7, weight.astype(np.int64) - 128
    multiplier = scales[0] * weight_scale / scales[1]
    for n, o, i, j in np.ndindex(2, 4, 4, 4):
        group = centred[n, o // 2 * 3 : o // 2 * 3 + 3, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        total = np.float32(int((group * q[o]).sum()) + int(bias[o]))
        expected = int(np.clip(np.rint(total * multiplier[o]) + 128, 0, 255))
        assert int(y[n, o, i, j]) == expected


def test_sums_beyond_24_bits_are_exact():
    x = torch.full((1, 1152, 1, 1), 255, dtype=torch.uint8)
    weight = torch.full((1, 1152, 1, 1), 255, dtype=torch.uint8)
    weight[0, 0] = 254
    # 255 * 127 * 1152 - 255, of which one unit of the last place would be 4 in float32.
    one = torch.ones(())
    bias = torch.tensor([-(255 * 127 * 1152 - 255) + 3], dtype=torch.int32)
    y = integer_convolution_eager(x, one, weight, torch.ones(1), one, bias, 0, 0, [0] * 4, 1, 1)
    assert y.item() == 3


def test_bytes_of_pixels_and_sums_of_bytes():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert torch.equal(
        pixel_bytes_eager(normalised(values), torch.tensor(PIXEL_SCALE)),
        torch.from_numpy(values).permute(0, 3, 1, 2),
    )
    a, b = (
        torch.tensor([0, 128, 200, 255], dtype=torch.uint8),
        torch.tensor([100, 130, 200, 255], dtype=torch.uint8),
    )
    assert integer_sum_eager(a, b, torch.ones(())).tolist() == [0, 130, 255, 255]


def test_onnx_runtime_gives_the_same_bytes(encoder, tmp_path):
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, pixel_values):
            return self.encoder.features(pixel_values)

    set_traced(encoder, True)
    try:
        onnx_ir.save(graph_of(Features().eval(), torch.zeros(2, 3, 128, 128)), tmp_path / "features.onnx")
    finally:
        set_traced(encoder, False)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "features.onnx"), providers=["CPUExecutionProvider"]
    )
    noise = np.random.default_rng(5).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    pixels = normalised(np.concatenate([pictures(2, 128, seed=4), noise]))
    (bytes_of_ort,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        bytes_of_torch = encoder.features(pixels).numpy()
    assert bytes_of_ort.dtype == np.uint8
    assert len(np.unique(bytes_of_torch)) > 20
    assert np.array_equal(bytes_of_ort, bytes_of_torch)


def test_whole_numbers_follow_the_float_encoder(encoder):
    config = encoder.config
    layers = fold(float_state(config), config, "made here")
    pixels = normalised(pictures(4, 128, seed=9))
    with torch.no_grad():
        y = layers["stem"](pixels)
        for block in blocks(config.width_multiplier, config.depth_multiplier):
            before = y
            for sizes in block.convolutions:
                y = layers[sizes.name](y)
            y = y + before if block.has_shortcut else y
        expected = layers["head"](y).flatten()
        found = (encoder.features(pixels).float() * encoder.head.output_scale).flatten()
    assert np.corrcoef(found, expected)[0, 1] > 0.97


def test_tokens_are_quarters_and_windows_with_probabilities(encoder):
    features = torch.randint(0, 256, (2, 1280, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        tokens = encoder.tokens(features)
        scale = encoder.head.output_scale
        assert tokens.shape == (2, 1 + 4, 4 * 1280 + 10)
        whole, window = tokens[1, 0, : 4 * 1280].view(4, 1280), tokens[1, 1 + 2, : 4 * 1280].view(4, 1280)
        # The third quarter is the lower left one; window 2 is too, and its second cell is row 2, column 1.
        assert torch.equal(whole[2], features[1, :, 2:, :2].float().mean((1, 2)) * scale)
        assert torch.equal(window[1], features[1, :, 2, 1].float() * scale)
        mean = features[1].float().mean((1, 2)) * scale
        expected = F.softmax(encoder.classifier(mean), -1).sqrt() * POSTERIOR_SCALE
        torch.testing.assert_close(tokens[1, 0, 4 * 1280 :], expected)
        # Around a window of this small map lies all of it.
        own = features[1, :, 2:, :2].float().mean((1, 2)) * scale
        expected = F.softmax(encoder.window_classifier((own + mean) / 2), -1).sqrt() * POSTERIOR_SCALE
        torch.testing.assert_close(tokens[1, 3, 4 * 1280 :], expected)


def test_windows_are_told_by_their_places_and_those_around():
    weights = pooling_matrix(8)
    assert weights.shape == (17, 64)
    assert torch.equal(weights.sum(1), torch.ones(17))
    assert torch.equal(weights[0], torch.full((64,), 1 / 64))
    # Window 6 is in row 1, column 1: places 2 and 3 of each axis, and 1 to 4 around them.
    window = weights[1 + 5].view(8, 8)
    assert window[2, 2] == 0.5 / 4 + 0.5 / 16
    assert window[1, 4] == 0.5 / 16
    assert window[0, 2] == window[5, 2] == 0
    # At an edge the larger square moves inwards.
    corner = weights[1].view(8, 8)
    assert corner[3, 3] == 0.5 / 16
    assert corner[4, 0] == 0


def test_a_model_with_this_encoder_has_the_shapes_of_its_configuration():
    config = dataclasses.replace(preset("photo"), vision=vision(name_pieces=2), prefix_tokens=0)
    model = MicroVLM(config)
    assert config.prefix_tokens == 5 + 2
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == weight_shapes(config)
    prefix = model.encode_image(torch.randn(2, 3, 128, 128))
    assert prefix.shape == (2, 7, config.text.hidden_size)
    prefix.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.adapter.parameters())
    assert all(parameter.grad is None for parameter in model.vision.parameters())


def test_the_likeliest_class_is_spelled_behind_the_tokens():
    config = dataclasses.replace(preset("photo"), vision=vision(name_pieces=2), prefix_tokens=0)
    adapter = GridAdapter(config, linear_factory(32))
    wide = config.text.hidden_size
    table = torch.randn(10, 2, wide)
    with torch.no_grad():
        adapter.names.weight.copy_(table.flatten(1).T)
        features = torch.rand(1, 5, config.vision.features_of_token + 10)
        probabilities = torch.zeros(10)
        probabilities[3], probabilities[7] = 0.9, 0.1
        features[0, 0, -10:] = probabilities.sqrt() * POSTERIOR_SCALE
        spelled = adapter(features)[0, 5:]
        # Fourth powers of .9 and .1: the second class has a part in 6,562.
        torch.testing.assert_close(spelled, (6561 * table[3] + table[7]) / 6562)
        torch.testing.assert_close(adapter(features, table), adapter(features))
        torch.testing.assert_close(adapter(features[:, :1])[:, 0], adapter(features)[:, 0])
    weights = adapter.pooling_weights(features)
    assert weights.shape == (1, 7, 5)
    assert torch.equal(weights[0, 5:].argmax(1), torch.zeros(2, dtype=torch.int64))


def test_an_exported_model_with_this_encoder_is_the_same_model(encoder, tmp_path):
    config = tiny_config(vision=vision(name_pieces=2), prefix_tokens=0)
    model = seeded_model(config)
    model.vision.load_state_dict(encoder.state_dict())
    model.save_pretrained(tmp_path / "checkpoint")
    # It raises CheckFailed if a graph differs from torch.
    report = export(tmp_path / "checkpoint", tmp_path / "bundle", WeightFormat(), threads=1)
    assert "vision_encoder" in {check.graph for check in report.checks}
    pixels = normalised(pictures(3, 128, seed=3)).numpy()
    of_torch, of_ort = (load(name, tmp_path / "bundle").encode_image(pixels) for name in ("torch", "ort"))
    assert of_ort.shape == (3, 7, config.text.hidden_size)
    np.testing.assert_allclose(of_ort, of_torch, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch_size": 32}, "'patch_size' must be 64 for efficientnet-lite"),
        ({"hidden_size": 192}, "'hidden_size' must be 1280 for efficientnet-lite"),
        ({"num_classes": 0}, "'num_classes' must be at least 1 for efficientnet-lite"),
        ({"image_size": 192}, "'image_size' must be 128, 256 or a further doubling for efficientnet-lite"),
        ({"architecture": "vit", "hidden_size": 192}, "'num_classes' must be 0 for a ViT"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence.replace("'", ".")):
        vision(**changes)


def test_prefix_tokens_are_the_encoders_tokens():
    with pytest.raises(UserError, match="more than the windows"):
        dataclasses.replace(preset("photo"), prefix_tokens=16)
    assert MicroVLMConfig.from_dict(preset("photo").to_dict()) == preset("photo")


def test_weights_of_another_network_and_no_pictures_are_refused():
    config = vision()
    state = float_state(config)
    with pytest.raises(UserError, match="no pictures to calibrate"):
        integer_tensors(state, config, [], "made here")
    del state["_conv_head.weight"]
    with pytest.raises(UserError, match=r"weights\.bin has no '_conv_head\.weight'"):
        integer_tensors(state, config, [pictures(1, 128)], "weights.bin")


def test_a_vits_configuration_has_no_keys_of_convolutions():
    assert not {"architecture", "num_classes", "width_multiplier"} & preset("nano").to_dict()["vision"].keys()
    assert preset("photo").to_dict()["vision"]["architecture"] == "efficientnet-lite"
