"""The configuration of a MicroVLM: frozen dataclasses that check their values and read and write JSON. No torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from microvlm.errors import UserError

CONFIG = "config.json"
"""The configuration's file in a checkpoint and in a bundle."""
CONFIG_FORMAT = 1


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(f"bad configuration: {sentence}.")


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "text"),
    "bool": (bool, "true or false"),
}


def _check_fields(part: Any) -> None:
    """Raise UserError unless every field has its type and every number is positive (or 0 where that has a meaning)."""
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        if item.type not in _KINDS:
            continue
        kind, words = _KINDS[str(item.type)]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        _require(fits, f"{item.name} must be {words}, not {value!r}")
        if item.type in ("int", "float"):
            may_be_zero = item.name in ("prefix_tokens", "scope_threshold", "readout_size")
            _require(
                value > 0 or (may_be_zero and value == 0), f"{item.name} must be positive, not {value!r}"
            )


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a ViT or DeiT encoder (Touvron et al. 2021, arXiv 2012.12877)."""

    image_size: int = 224
    """Side of the square input, pixels."""
    patch_size: int = 16
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    intermediate_size: int = 768
    layer_norm_eps: float = 1e-12
    distillation_token: bool = False
    """Whether the encoder has DeiT's distillation token beside [CLS]."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("image_mean", "image_std"):
            _require(len(getattr(self, name)) == 3, f"{name} must have three numbers, one a channel")
        _require(self.image_size % self.patch_size == 0, "image_size must be a multiple of patch_size")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "vision hidden_size must be a multiple of num_attention_heads",
        )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_leading_tokens(self) -> int:
        return 2 if self.distillation_token else 1


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a Qwen2 or Llama causal decoder."""

    vocab_size: int = 151_936
    hidden_size: int = 896
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 4864
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    attention_bias: bool = True
    """Whether q, k and v have biases: true for Qwen2, false for Llama."""
    sub_norm: bool = False
    """Whether o_proj and down_proj have an RMSNorm before them (SubLN), added when a decoder becomes ternary."""
    max_position_embeddings: int = 32_768

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads must be a multiple of num_key_value_heads",
        )
        _require(self.head_dim % 2 == 0, "head_dim must be even for rotary embeddings")

    @property
    def kv_width(self) -> int:
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class MemoryConfig:
    """Sizes of Larimar's episodic memory (Das et al. 2024, arXiv 2403.11901) and of the encoder of its latents."""

    slots: int = 512
    """K, the rows of the memory."""
    code_size: int = 896
    """C, the width of a latent. K must be less than C, else a reading equals its query whatever was written."""
    encoder_layers: int = 2
    observation_variance: float = 0.01
    """s2, the variance of the Kalman write."""
    scope_threshold: float = 0.5
    """The decoder sees a reading when the scope detector's probability is at least this."""
    readout_size: int = 0
    """Hidden width of the layers that correct a reading before W_M; 0 for none, as in the paper."""

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(self.slots < self.code_size, "memory slots must be fewer than code_size")


@dataclass(frozen=True)
class QuantizationConfig:
    """The widths that the weights were trained for. An export may store trits at another width."""

    decoder_bits: float = 32
    """Linear layers of the decoder and the memory encoder: 32, or 1.58 for ternary."""
    vision_bits: int = 32
    """Linear layers of vision encoder, adapter, W_M and scope detector: 32 or 8."""
    embedding_bits: int = 32
    """The token embedding, which is the output head too: 32 or 8."""

    def __post_init__(self) -> None:
        _require(self.decoder_bits in (32, 1.58), "decoder_bits must be 32 or 1.58")
        _require(self.vision_bits in (32, 8), "vision_bits must be 32 or 8")
        _require(self.embedding_bits in (32, 8), "embedding_bits must be 32 or 8")

    @property
    def is_ternary(self) -> bool:
        return self.decoder_bits == 1.58


@dataclass(frozen=True)
class PromptConfig:
    """The template and the special tokens that turn images and a question into one token sequence."""

    template: str = "<image>{prompt}<|assistant|>"
    """`<image>` stands for the prefix tokens of all images, `{prompt}` for the question."""
    image_token: str = "<image>"
    eos_token: str = "<|end|>"
    pad_token: str = "<|pad|>"
    caption_prompt: str = "describe the image"
    """The prompt that describes an image when the user gives none."""
    fold_text: bool = False
    """Whether questions and facts are converted to lower case with single blanks and no final full stops
    (`Processor.normalize_text`), for a model that was trained on such text only."""

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class MicroVLMConfig:
    """The configuration of a whole model. `name` is only a label."""

    name: str = "custom"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    prefix_tokens: int = 0
    """k, the embeddings of one image; 0 takes clamp(ceil(patches / 8), 8, 64)."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.prefix_tokens == 0:
            object.__setattr__(self, "prefix_tokens", min(64, max(8, ceil(self.vision.num_patches / 8))))

    @property
    def memory_kv_outputs(self) -> int:
        """Rows of W_M: a key and a value per layer, of all KV heads."""
        return self.text.num_hidden_layers * 2 * self.text.kv_width

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"model_type": "microvlm", "format": CONFIG_FORMAT, **dataclasses.asdict(self)}

    def save(self, directory: Path) -> None:
        """Write config.json into a directory."""
        (directory / CONFIG).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> MicroVLMConfig:
        """Build from config.json's content. Raises UserError for another model type, a newer format and bad values."""
        raw = dict(raw) if isinstance(raw, dict) else {}
        if raw.pop("model_type", None) != "microvlm":
            raise UserError("config.json is not a MicroVLM configuration (its model_type is not 'microvlm').")
        file_format = raw.pop("format", 0)
        if not isinstance(file_format, int) or file_format > CONFIG_FORMAT:
            raise UserError("config.json was written by a newer microvlm; upgrade the package.")
        parts = {
            "vision": VisionConfig,
            "text": TextConfig,
            "memory": MemoryConfig,
            "quantization": QuantizationConfig,
            "prompt": PromptConfig,
        }
        try:
            for key, part in parts.items():
                section = raw.get(key, {})
                _require(isinstance(section, dict), f"'{key}' must be an object, not {section!r}")
                raw[key] = part(**_tuples(section))
            return cls(**raw)
        except TypeError as error:
            raise UserError(f"config.json has a key this version does not know: {error}.") from error

    @classmethod
    def load(cls, directory: Path) -> MicroVLMConfig:
        """Load a directory's config.json. Raises UserError when it is missing or is not valid."""
        path = Path(directory) / CONFIG
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: {directory} is not a MicroVLM checkpoint or bundle."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise UserError(f"{path} is not valid JSON: copy the checkpoint again.") from None


def _tuples(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def __getattr__(name: str) -> Any:
    # Presets were once defined here; `from microvlm.config import preset` still works.
    if name in ("preset", "preset_names"):
        from microvlm import presets

        return getattr(presets, name)
    raise AttributeError(f"module 'microvlm.config' has no attribute '{name}'")
