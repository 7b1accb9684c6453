"""Reads Hugging Face config.json files of ViT/DeiT encoders and Qwen2/Llama decoders into our configurations.

Raises UserError for every setting that the reference model would compute differently. Reads no weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from microvlm.config import CONFIG, TextConfig, VisionConfig
from microvlm.errors import UserError
from microvlm.inputs.processor_files import PREPROCESSOR, read_statistics

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def vision_config(directory: Path) -> VisionConfig:
    """The configuration of a ViT or DeiT directory. Raises UserError for another architecture."""
    raw, path = _read_config(directory)
    kind = raw.get("model_type")
    _refuse_unless(
        kind in ("vit", "deit"), path, f"a '{kind}' encoder is not supported; use a ViT or DeiT one"
    )
    _refuse_unless(
        raw.get("hidden_act", "gelu") == "gelu", path, "only the exact gelu activation is supported"
    )
    _refuse_unless(raw.get("qkv_bias", True), path, "an encoder without q, k and v biases is not supported")
    _refuse_unless(raw.get("num_channels", 3) == 3, path, "only images of 3 channels are supported")
    _refuse_unless(
        "quantization_config" not in raw, path, "quantised weights are not supported; use float ones"
    )
    mean, std = _normalisation(directory, HALF if kind == "vit" else IMAGENET)
    return VisionConfig(
        image_size=_side(raw, "image_size", path),
        patch_size=_side(raw, "patch_size", path),
        hidden_size=_integer(raw, "hidden_size", path),
        num_hidden_layers=_integer(raw, "num_hidden_layers", path),
        num_attention_heads=_integer(raw, "num_attention_heads", path),
        intermediate_size=_integer(raw, "intermediate_size", path),
        layer_norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
        distillation_token=kind == "deit",
        image_mean=mean,
        image_std=std,
    )


def text_config(directory: Path, sub_norm: bool = False) -> TextConfig:
    """The configuration of a Qwen2 or Llama directory. Raises UserError for what our decoder does not compute."""
    raw, path = _read_config(directory)
    kind = raw.get("model_type")
    _refuse_unless(
        kind in ("qwen2", "llama"), path, f"a '{kind}' decoder is not supported; use Qwen2 or Llama"
    )
    _refuse_unless(raw.get("hidden_act", "silu") == "silu", path, "only the silu activation is supported")
    _refuse_unless(
        raw.get("tie_word_embeddings", False), path, "the output head is not tied to the embedding"
    )
    _refuse_unless(
        kind == "qwen2" or not raw.get("attention_bias"), path, "attention biases are not supported in Llama"
    )
    _refuse_unless(not raw.get("mlp_bias"), path, "biases in the MLP are not supported")
    sliding = bool(raw.get("use_sliding_window")) or set(raw.get("layer_types") or ()) - {"full_attention"}
    _refuse_unless(not sliding, path, "sliding-window attention is not supported")
    _refuse_unless(
        "quantization_config" not in raw, path, "quantised weights are not supported; use float ones"
    )
    heads, width = _integer(raw, "num_attention_heads", path), _integer(raw, "hidden_size", path)
    return TextConfig(
        vocab_size=_integer(raw, "vocab_size", path),
        hidden_size=width,
        num_hidden_layers=_integer(raw, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or width // heads,
        intermediate_size=_integer(raw, "intermediate_size", path),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(raw, path),
        attention_bias=kind == "qwen2",
        sub_norm=sub_norm,
        max_position_embeddings=raw.get("max_position_embeddings") or (32_768 if kind == "qwen2" else 2048),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises UserError."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a Hugging Face checkpoint.") from None
    except (OSError, ValueError):
        raise UserError(f"{path} is not readable JSON: copy the checkpoint again.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object: copy the checkpoint again.")
    return raw


def _read_config(directory: Path) -> tuple[dict[str, Any], Path]:
    path = directory / CONFIG
    return read_json(path), path


def _refuse_unless(condition: Any, path: Path, sentence: str) -> None:
    if not condition:
        raise UserError(f"{path}: {sentence}.")


def _integer(raw: dict[str, Any], key: str, path: Path) -> int:
    value = raw.get(key)
    _refuse_unless(
        isinstance(value, int) and value > 0, path, f"'{key}' is missing or not a positive whole number"
    )
    return int(raw[key])


def _side(raw: dict[str, Any], key: str, path: Path) -> int:
    """A side length: an integer, or a list [height, width] of two equal integers."""
    value = raw.get(key)
    if isinstance(value, list):
        _refuse_unless(
            len(set(value)) == 1, path, f"'{key}' is not square, and only square images are supported"
        )
        return _integer({key: value[0]}, key, path)
    return _integer(raw, key, path)


def _rope_theta(raw: dict[str, Any], path: Path) -> float:
    """The base of the rotary embedding, from `rope_theta` or from the `rope_parameters` of transformers 5."""
    parameters = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    kinds = {part.get(key) for part in (parameters, scaling) for key in ("rope_type", "type")} - {None}
    partial = raw.get("partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0))
    _refuse_unless(
        kinds <= {"default"} and partial == 1.0, path, "scaled or partial rotary embeddings are not supported"
    )
    return float(parameters.get("rope_theta", raw.get("rope_theta", 10_000.0)))


def _normalisation(directory: Path, default: tuple) -> tuple[tuple, tuple]:
    """Mean and standard deviation from preprocessor_config.json, or the family's default."""
    try:
        return read_statistics(directory / PREPROCESSOR, *default)
    except FileNotFoundError:
        return default
