"""Reads Hugging Face config.json files of ViT/DeiT encoders and Qwen2/Llama/BitNet decoders into our configurations.

Raises UserError for every setting that the reference model would compute differently. Reads no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from microvlm.config import CONFIG, TextConfig, VisionConfig
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Size, quote
from microvlm.inputs.processor_files import PREPROCESSOR, read_statistics

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MAX_CONFIG_BYTES = 10_000_000
_REMEDY = "correct it, or copy the checkpoint again"
T = TypeVar("T")


class _Kind(msgspec.Struct, frozen=True):
    model_type: str | None = None


_Side = Size | Annotated[list[Size], Meta(min_length=2, max_length=2)]
"""A side, or [height, width]."""


class _VisionFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a ViT or DeiT config.json. A key that may be left out may be null, and means the default."""

    model_type: str | None = None
    hidden_act: str | None = None
    qkv_bias: bool | None = None
    num_channels: int | None = None
    quantization_config: Any = None
    image_size: _Side
    patch_size: _Side
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    layer_norm_eps: float | None = None


class _Rotary(msgspec.Struct, frozen=True):
    """`rope_scaling`, or the `rope_parameters` of transformers 5."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


class _Quantization(msgspec.Struct, frozen=True):
    """`quantization_config`, of which BitNet's is read."""

    quant_method: str | None = None
    linear_class: str | None = None
    quantization_mode: str | None = None
    use_rms_norm: bool | None = None


class BitNet(NamedTuple):
    """How a BitNet checkpoint of transformers stores its linear layers."""

    is_packed: bool
    """Packed trits with a scale, or float weights that are rounded in every forward pass."""
    divides: bool
    """Whether a sum is divided by `weight_scale`, or multiplied."""


class _TextFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a Qwen2, Llama or BitNet config.json, as `_VisionFile`."""

    model_type: str | None = None
    hidden_act: str | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    layer_types: tuple[str, ...] | None = None
    quantization_config: _Quantization | None = None
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    intermediate_size: Size
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    rope_parameters: _Rotary | None = None
    rope_scaling: _Rotary | None = None
    partial_rotary_factor: float | None = None
    max_position_embeddings: Size | None = None


def vision_config(directory: Path) -> VisionConfig:
    """The configuration of a ViT or DeiT directory. Raises UserError for another architecture."""
    path = directory / CONFIG
    content = _read(path)
    kind = documents.parse(content, _Kind, path, _REMEDY).model_type
    _refuse_unless(kind in ENCODERS, path, f"a {quote(kind)} encoder is not supported; use a ViT or DeiT one")
    raw = documents.parse(content, _VisionFile, path, _REMEDY)
    _refuse_unless(raw.hidden_act in (None, "gelu"), path, "only the exact gelu activation is supported")
    _refuse_unless(raw.qkv_bias is not False, path, "an encoder without q, k and v biases is not supported")
    _refuse_unless(raw.num_channels in (None, 3), path, "only images of 3 channels are supported")
    _refuse_unless(
        raw.quantization_config is None, path, "quantised weights are not supported; use float ones"
    )
    mean, std = _normalisation(directory, HALF if kind == "vit" else IMAGENET)
    values = {
        "image_size": _side(raw.image_size, "image_size", path),
        "patch_size": _side(raw.patch_size, "patch_size", path),
        "hidden_size": raw.hidden_size,
        "num_hidden_layers": raw.num_hidden_layers,
        "num_attention_heads": raw.num_attention_heads,
        "intermediate_size": raw.intermediate_size,
        "layer_norm_eps": 1e-12 if raw.layer_norm_eps is None else raw.layer_norm_eps,
        "distillation_token": kind == "deit",
        "image_mean": mean,
        "image_std": std,
    }
    return documents.convert(values, VisionConfig, path, _REMEDY)


def text_config(directory: Path, sub_norm: bool = False) -> TextConfig:
    """The configuration of a Qwen2, Llama or BitNet directory.

    `sub_norm`: insert SubLN, which BitNet has anyway. Raises UserError for what our decoder does not compute.
    """
    path = directory / CONFIG
    content = _read(path)
    kind = documents.parse(content, _Kind, path, _REMEDY).model_type
    _refuse_unless(
        kind in DECODERS, path, f"a {quote(kind)} decoder is not supported; use Qwen2, Llama or BitNet"
    )
    defaults = DECODERS[str(kind)]
    raw = documents.parse(content, _TextFile, path, _REMEDY)
    _refuse_unless(
        (raw.hidden_act or defaults.hidden_act) == "silu", path, "only the silu activation is supported"
    )
    _refuse_unless(raw.tie_word_embeddings, path, "the output head is not tied to the embedding")
    _refuse_unless(
        kind == "qwen2" or not raw.attention_bias, path, f"attention biases are not supported in {kind}"
    )
    _refuse_unless(not raw.mlp_bias, path, "biases in the MLP are not supported")
    sliding = raw.use_sliding_window or set(raw.layer_types or ()) - {"full_attention"}
    _refuse_unless(not sliding, path, "sliding-window attention is not supported")
    _bitnet(raw, path)
    heads, width = raw.num_attention_heads, raw.hidden_size
    values = {
        "vocab_size": raw.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": raw.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": raw.num_key_value_heads or heads,
        "head_dim": raw.head_dim or width // heads,
        "intermediate_size": raw.intermediate_size,
        "rms_norm_eps": defaults.rms_norm_eps if raw.rms_norm_eps is None else raw.rms_norm_eps,
        "rope_theta": _rope_theta(raw, defaults.rope_theta, path),
        "attention_bias": kind == "qwen2",
        "sub_norm": sub_norm or kind == "bitnet",
        "max_position_embeddings": raw.max_position_embeddings or defaults.positions,
    }
    return documents.convert(values, TextConfig, path, _REMEDY)


class _Defaults(NamedTuple):
    """What transformers takes for a key that config.json leaves out."""

    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    positions: int = 2048


ENCODERS = ("vit", "deit")
DECODERS = {
    "qwen2": _Defaults(positions=32_768),
    "llama": _Defaults(),
    "bitnet": _Defaults(hidden_act="relu2", rms_norm_eps=1e-5, rope_theta=500_000.0),
}
"""The model types that are read."""


def bitnet_storage(directory: Path) -> BitNet | None:
    """How a decoder's directory stores trits; None for float weights. Raises UserError for other quantised weights."""
    path = directory / CONFIG
    return _bitnet(read_json(path, _TextFile), path)


def _bitnet(raw: _TextFile, path: Path) -> BitNet | None:
    stored = raw.quantization_config
    if stored is None:
        return None
    _refuse_unless(
        stored.quant_method == "bitnet",
        path,
        f"weights quantised by {quote(stored.quant_method)} are not supported; use float or BitNet ones",
    )
    _refuse_unless(
        not stored.use_rms_norm, path, "a norm in every linear layer ('use_rms_norm') is not supported"
    )
    linear, mode = stored.linear_class or "bitlinear", stored.quantization_mode or "offline"
    _refuse_unless(
        linear in ("bitlinear", "autobitlinear") and mode in ("offline", "online"),
        path,
        f"BitNet's {quote(linear)} layers at {quote(mode)} quantisation are not supported",
    )
    return BitNet(is_packed=linear == "bitlinear" or mode == "offline", divides=linear == "bitlinear")


def model_type(directory: Path) -> str | None:
    """`model_type` of a folder's config.json; None without one. Raises UserError, also for a missing file."""
    return read_json(directory / CONFIG, _Kind).model_type


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file of a Hugging Face checkpoint. Raises UserError."""
    return documents.parse(_read(path), kind, path, _REMEDY)


def _read(path: Path) -> bytes:
    try:
        return documents.read_file(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a Hugging Face checkpoint.") from None


def _refuse_unless(condition: Any, path: Path, sentence: str) -> None:
    if not condition:
        raise UserError(f"{path}: {sentence}.")


def _side(value: int | list[int], key: str, path: Path) -> int:
    """A side length: an integer, or [height, width] of two equal integers."""
    height, width = (value, value) if isinstance(value, int) else value
    _refuse_unless(height == width, path, f"'{key}' is not square, and only square images are supported")
    return height


def _rope_theta(raw: _TextFile, default: float, path: Path) -> float:
    """The base of the rotary embedding, from `rope_theta` or from the `rope_parameters` of transformers 5."""
    parameters = raw.rope_parameters or _Rotary()
    parts = (parameters, raw.rope_scaling or _Rotary())
    kinds = {kind for part in parts for kind in (part.rope_type, part.type)} - {None}
    shares = {raw.partial_rotary_factor, *(part.partial_rotary_factor for part in parts)} - {None}
    _refuse_unless(
        kinds <= {"default"} and shares <= {1.0},
        path,
        "scaled or partial rotary embeddings are not supported",
    )
    bases = (parameters.rope_theta, raw.rope_theta)
    return next((base for base in bases if base is not None), default)


def _normalisation(directory: Path, default: tuple) -> tuple[tuple, tuple]:
    """Mean and standard deviation from preprocessor_config.json, or the family's default."""
    try:
        return read_statistics(directory / PREPROCESSOR, *default)
    except FileNotFoundError:
        return default
