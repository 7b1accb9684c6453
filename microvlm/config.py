"""The configuration of a MicroVLM: frozen dataclasses that check their values and read and write JSON. No torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from microvlm.configuration.answers import AnswersConfig as AnswersConfig
from microvlm.configuration.checked_fields import (
    Base,
    Bits,
    Deviation,
    Epsilon,
    Heads,
    Label,
    Layers,
    Mean,
    Phrase,
    Positions,
    Share,
    Side,
    Token,
    Variance,
    Width,
    check_fields,
    require,
)
from microvlm.configuration.pointing import PointingConfig, PointingMap, PointingWeights
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.encoders.efficientnet_lite import COLOURS, HEAD_WIDTH, STRIDE, WINDOW

CONFIG = "config.json"
"""The configuration's file in a checkpoint and in a bundle."""
CONFIG_FORMAT = 1
MAX_BYTES = 1_000_000
"""Size of the largest config.json that is read."""
MAX_PATCHES = 65_536
NOT_OF_VIT = ("architecture", "width_multiplier", "depth_multiplier", "num_classes", "name_pieces", "resize")
"""Fields of the vision part that a ViT's config.json does not have."""
Rotation = Literal[0, 16, 64]
"""Width of the Hadamard matrices of a residual stream; 0 for none."""
_REMEDY = "correct it, or copy the model again"


class _Format(msgspec.Struct, frozen=True):
    format: int


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision encoder: ViT or DeiT (Touvron et al. 2021, arXiv 2012.12877), or EfficientNet-Lite (Tan and Le
    2019, arXiv 1905.11946), whose layers follow from its two multipliers."""

    image_size: Side = 224
    """Side of the square input, pixels."""
    patch_size: Side = 16
    """Pixels on a side of what one token describes: a ViT's patch, or 64 for EfficientNet-Lite, 2 x 2 places of its
    last feature map."""
    hidden_size: Width = 192
    """Width of a ViT's token, or EfficientNet-Lite's 1280 features of a place."""
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 3
    intermediate_size: Width = 768
    layer_norm_eps: Epsilon = 1e-12
    distillation_token: bool = False
    """Whether the encoder has DeiT's distillation token beside [CLS]."""
    image_mean: tuple[Mean, Mean, Mean] = (0.5, 0.5, 0.5)
    image_std: tuple[Deviation, Deviation, Deviation] = (0.5, 0.5, 0.5)
    architecture: Literal["vit", "efficientnet-lite"] = "vit"
    width_multiplier: Annotated[float, Meta(ge=0.1, le=4)] = 1.0
    """Of EfficientNet-Lite: 1.0 in Lite0 and Lite1, 1.1 in Lite2."""
    depth_multiplier: Annotated[float, Meta(ge=0.1, le=4)] = 1.0
    """Of EfficientNet-Lite: 1.0 in Lite0, 1.1 in Lite1, 1.2 in Lite2."""
    num_classes: Annotated[int, Meta(ge=0, le=65_536)] = 0
    """Classes whose probabilities stand behind the features of a token; a ViT has none."""
    name_pieces: Annotated[int, Meta(ge=0, le=16)] = 0
    """Prefix embeddings behind those of the tokens, which spell the likeliest class's name: tokens of text."""
    resize: Literal["pad", "stretch"] = "pad"
    """How a picture becomes a square: laid in the middle of a white one, or stretched. A ViT pads."""
    colours: bool = False
    """Whether the mean colour of each place stands behind EfficientNet-Lite's features, which hardly tell colours."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.image_size % self.patch_size == 0, "'image_size' must be a multiple of 'patch_size'")
        require(self.num_patches <= MAX_PATCHES, f"there are more than {MAX_PATCHES:,} patches in an image")
        if self.is_convolutional:
            kind = f"for {self.architecture}"
            require(self.patch_size == WINDOW * STRIDE, f"'patch_size' must be {WINDOW * STRIDE} {kind}")
            require(self.hidden_size == HEAD_WIDTH, f"'hidden_size' must be {HEAD_WIDTH} {kind}")
            require(self.num_classes > 0, f"'num_classes' must be at least 1 {kind}")
            # Quarters of the last feature map are whole numbers of places, and means over them exact.
            side = self.image_size // STRIDE
            require(
                self.image_size % STRIDE == 0 and side & (side - 1) == 0 and side >= 2 * WINDOW,
                f"'image_size' must be {2 * WINDOW * STRIDE}, {4 * WINDOW * STRIDE} or a further doubling {kind}",
            )
            return
        for name, none in (("num_classes", "0"), ("name_pieces", "0"), ("colours", "false")):
            require(not getattr(self, name), f"'{name}' must be {none} for a ViT")
        require(self.resize == "pad", "'resize' must be \"pad\" for a ViT")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            "'hidden_size' must be a multiple of 'num_attention_heads'",
        )

    @property
    def is_convolutional(self) -> bool:
        return self.architecture == "efficientnet-lite"

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def features_of_token(self) -> int:
        """Features of a token, without colours and class probabilities."""
        return WINDOW * WINDOW * self.hidden_size if self.is_convolutional else self.hidden_size

    @property
    def colours_of_token(self) -> int:
        """Numbers of the colours that stand behind the features of a token: 3 of each of its places, or none."""
        return WINDOW * WINDOW * COLOURS if self.colours else 0

    @property
    def num_leading_tokens(self) -> int:
        return 2 if self.distillation_token else 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the adapter gets: one or two of the whole picture, and one of each patch or window."""
        return self.num_leading_tokens + self.num_patches


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a Qwen2 or Llama causal decoder."""

    vocab_size: Positions = 151_936
    hidden_size: Width = 896
    num_hidden_layers: Layers = 24
    num_attention_heads: Heads = 14
    num_key_value_heads: Heads = 2
    head_dim: Width = 64
    intermediate_size: Width = 4864
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Base = 1_000_000.0
    attention_bias: bool = True
    """Whether q, k and v have biases: true for Qwen2, false for Llama."""
    sub_norm: bool = False
    """Whether o_proj and down_proj have an RMSNorm before them (SubLN), added when a decoder becomes ternary."""
    max_position_embeddings: Positions = 32_768
    rotation: Rotation = 0
    """Width of the Hadamard matrices that rotate the residual stream of the layers (QuaRot, arXiv 2404.00456, section
    4.2; SpinQuant's R1, arXiv 2405.16406); 0 for none. Where it is made the layers' weights are rotated to match, and
    so cost nothing: only what goes into the first layer and comes out of the last one is rotated at run time."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.rotation == 0 or self.hidden_size % self.rotation == 0,
            "'rotation' must divide 'hidden_size'",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "'num_attention_heads' must be a multiple of 'num_key_value_heads'",
        )
        require(self.head_dim % 2 == 0, "'head_dim' must be even for rotary embeddings")

    @property
    def kv_width(self) -> int:
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class MemoryConfig:
    """Sizes of Larimar's episodic memory (Das et al. 2024, arXiv 2403.11901) and of the encoder of its latents."""

    slots: Width = 512
    """K, the rows of the memory."""
    code_size: Width = 896
    """C, the width of a latent. K must be less than C, else a reading equals its query whatever was written."""
    encoder_layers: Layers = 2
    observation_variance: Variance = 0.01
    """s2, the variance of the Kalman write."""
    scope_threshold: Share = 0.5
    """The decoder sees a reading when the scope detector's probability is at least this."""
    readout_size: Annotated[int, Meta(ge=0, le=262_144)] = 0
    """Hidden width of the layers that correct a reading before W_M; 0 for none, as in the paper."""
    pointing: PointingConfig = field(default_factory=PointingConfig)
    """When an entry's own text is said. `microvlm-bench memory --fit-pointing` fits it to a model."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.slots < self.code_size, "'slots' must be fewer than 'code_size'")


@dataclass(frozen=True)
class QuantizationConfig:
    """The widths that the weights were trained for. An export may store trits at another width."""

    decoder_bits: Bits = 32
    """Linear layers of the decoder and the memory encoder: 32, or 1.58 for ternary."""
    vision_bits: Bits = 32
    """Linear layers of vision encoder, adapter, W_M and scope detector: 32 or 8."""
    embedding_bits: Bits = 32
    """The token embedding, which is the output head too: 32 or 8."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.decoder_bits in (32, 1.58), "'decoder_bits' must be 32 or 1.58")
        require(self.vision_bits in (32, 8), "'vision_bits' must be 32 or 8")
        require(self.embedding_bits in (32, 8), "'embedding_bits' must be 32 or 8")

    @property
    def is_ternary(self) -> bool:
        return self.decoder_bits == 1.58


@dataclass(frozen=True)
class PromptConfig:
    """The template and the special tokens that turn images and a question into one token sequence."""

    template: Phrase = "<image>{prompt}<|assistant|>"
    """`<image>` stands for the prefix tokens of all images, `{prompt}` for the question."""
    image_token: Token = "<image>"
    eos_token: Token = "<|end|>"
    pad_token: Token = "<|pad|>"
    caption_prompt: Phrase = "describe the image"
    """The prompt that describes an image when the user gives none."""
    fold_text: bool = False
    """Whether questions and facts are converted to lower case with single blanks and no final full stops
    (`Processor.normalize_text`), for a model that was trained on such text only."""

    def __post_init__(self) -> None:
        check_fields(self)
        for part in (self.image_token, "{prompt}"):
            require(self.template.count(part) == 1, f"'template' must have {documents.quote(part)} once")


@dataclass(frozen=True)
class MicroVLMConfig:
    """The configuration of a whole model. `name` is only a label."""

    name: Label = "custom"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    prefix_tokens: Annotated[int, Meta(ge=0, le=16_384)] = 0
    """k, the embeddings of one image; 0 takes clamp(ceil(patches / 8), 8, 64), or all that EfficientNet-Lite gives."""
    answers: AnswersConfig | None = None
    """How sure answers are; None for a model that was never calibrated, which declines nothing."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.name.isprintable(), "'name' has characters that cannot be printed")
        whole = self.vision.num_tokens + self.vision.name_pieces
        if self.prefix_tokens == 0:
            k = min(64, max(8, ceil(self.vision.num_patches / 8)))
            object.__setattr__(self, "prefix_tokens", whole if self.vision.is_convolutional else k)
        require(
            not self.vision.is_convolutional or self.prefix_tokens == whole,
            "'prefix_tokens' must be 1 + 'name_pieces' more than the windows of the encoder's last feature map, or 0",
        )
        require(
            self.prefix_tokens < self.text.max_position_embeddings,
            "'prefix_tokens' must be fewer than 'text.max_position_embeddings'",
        )

    @property
    def memory_kv_outputs(self) -> int:
        """Rows of W_M: a key and a value per layer, of all KV heads."""
        return self.text.num_hidden_layers * 2 * self.text.kv_width

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json. What the model lacks has no key, and weights that are the default none."""
        parts = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.memory.pointing == PointingConfig():
            del parts["memory"]["pointing"]
        elif self.memory.pointing.same_picture is None:
            for name in ("same_picture", "same_question"):
                del parts["memory"]["pointing"][name]
        if not self.text.rotation:
            del parts["text"]["rotation"]
        absent = () if self.vision.is_convolutional else NOT_OF_VIT
        for name in (*absent, *(() if self.vision.colours else ("colours",))):
            del parts["vision"][name]
        return {"model_type": "microvlm", "format": CONFIG_FORMAT, **parts}

    def save(self, directory: Path) -> None:
        """Write config.json into a directory."""
        (directory / CONFIG).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, raw: dict[str, Any], origin: object = CONFIG) -> MicroVLMConfig:
        """Build from config.json's content, which `origin` names in errors.

        Raises UserError for another model type, a newer format, an unknown key and a value of a wrong type or range.
        """
        values = dict(raw) if isinstance(raw, dict) else {}
        if values.pop("model_type", None) != "microvlm":
            raise UserError(
                f"{origin} is not a MicroVLM configuration (its model_type is not 'microvlm'): give another model."
            )
        version = documents.convert({"format": values.pop("format", 0)}, _Format, origin, _REMEDY)
        if version.format > CONFIG_FORMAT:
            raise UserError(f"{origin} was written by a newer microvlm; upgrade the package.")
        values.pop("auto_map", None)  # names of classes for transformers, which nothing here runs
        _refuse_unknown_keys(values, cls, origin)
        return documents.convert(values, cls, origin, _REMEDY)

    @classmethod
    def load(cls, directory: Path) -> MicroVLMConfig:
        """Load a directory's config.json. Raises UserError when it is missing or is not valid."""
        path = Path(directory) / CONFIG
        try:
            raw = documents.load(path, dict[str, Any], _REMEDY, limit=MAX_BYTES)
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: {directory} is not a MicroVLM checkpoint or bundle."
            ) from None
        return cls.from_dict(raw, path)


def _refuse_unknown_keys(values: dict[str, Any], part: type, origin: object, prefix: str = "") -> None:
    """Raise UserError for a key that no field has: it would change what the model computes."""
    fields = {item.name: item.type for item in dataclasses.fields(part)}
    for key, value in values.items():
        if key not in fields:
            name = documents.quote(f"{prefix}{key}")
            raise UserError(
                f"{origin}: {name} is not known to this version: upgrade microvlm, or remove the key."
            )
        if isinstance(value, dict) and key in _PARTS:
            _refuse_unknown_keys(value, _PARTS[key], origin, f"{key}.")


_PARTS: dict[str, type] = {
    "vision": VisionConfig,
    "text": TextConfig,
    "memory": MemoryConfig,
    "quantization": QuantizationConfig,
    "prompt": PromptConfig,
    "answers": AnswersConfig,
    "pointing": PointingConfig,
    "same_picture": PointingMap,
    "same_question": PointingMap,
    "weights": PointingWeights,
}


def __getattr__(name: str) -> Any:
    # Presets were once defined here; `from microvlm.config import preset` still works.
    if name in ("preset", "preset_names"):
        from microvlm import presets

        return getattr(presets, name)
    raise AttributeError(f"module 'microvlm.config' has no attribute '{name}'")
