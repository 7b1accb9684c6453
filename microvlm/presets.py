"""Named presets: the model sizes and prompts that the project trains and measures. Imports no torch."""

from __future__ import annotations

import dataclasses

from microvlm.config import (
    MemoryConfig,
    MicroVLMConfig,
    PromptConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)
from microvlm.errors import UserError

QWEN_PROMPT = PromptConfig(
    template="<|im_start|>user\n<|image_pad|>{prompt}<|im_end|>\n<|im_start|>assistant\n",
    image_token="<|image_pad|>",
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    caption_prompt="Describe this image.",
)
SMOLLM_PROMPT = dataclasses.replace(
    QWEN_PROMPT,
    template="<|im_start|>user\n<image>{prompt}<|im_end|>\n<|im_start|>assistant\n",
    image_token="<image>",
)

_PRESETS: dict[str, MicroVLMConfig] = {
    # 96 px in 12 px patches costs the same 64 tokens as 64 px in 8 px patches and shows more of a scene.
    "nano": MicroVLMConfig(
        name="nano",
        vision=VisionConfig(
            image_size=96, patch_size=12, num_hidden_layers=6, layer_norm_eps=1e-6, distillation_token=True
        ),
        text=TextConfig(
            vocab_size=2048,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=512,
            rope_theta=10_000.0,
            sub_norm=True,
            max_position_embeddings=512,
        ),
        # A variance of a tenth of a key's square, because another view of an object never has the same key.
        memory=MemoryConfig(slots=64, code_size=192, observation_variance=0.1, readout_size=384),
        prompt=PromptConfig(fold_text=True),
        quantization=QuantizationConfig(decoder_bits=1.58, vision_bits=8, embedding_bits=8),
        # The two leading tokens and a 4 x 4 grid of regions.
        prefix_tokens=18,
    ),
    # 256 px: 8 x 8 places see two objects side by side better than the 7 x 7 of 224 px, at 1.3 times the work.
    "photo": MicroVLMConfig(
        name="photo",
        vision=VisionConfig(
            architecture="efficientnet-lite",
            image_size=256,
            patch_size=64,
            hidden_size=1280,
            num_attention_heads=1,
            # About 1,000 names of photographs, 540 of drawings and what has no name; the rest are for further names.
            num_classes=1664,
            name_pieces=4,
            resize="stretch",
            # Pixels are bytes of zero 127 and step 1 / 128.
            image_mean=(127 / 255,) * 3,
            image_std=(128 / 255,) * 3,
        ),
        text=TextConfig(
            vocab_size=8192,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=512,
            rope_theta=10_000.0,
            sub_norm=True,
            max_position_embeddings=1024,
        ),
        memory=MemoryConfig(slots=128, code_size=256, observation_variance=0.1, readout_size=512),
        prompt=PromptConfig(fold_text=True),
        quantization=QuantizationConfig(decoder_bits=1.58, vision_bits=8, embedding_bits=8),
    ),
    "small": MicroVLMConfig(
        name="small",
        text=TextConfig(
            vocab_size=49_152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            rms_norm_eps=1e-5,
            rope_theta=100_000.0,
            attention_bias=False,
            max_position_embeddings=8192,
        ),
        memory=MemoryConfig(slots=512, code_size=576),
        prompt=SMOLLM_PROMPT,
    ),
    "full": MicroVLMConfig(name="full", prompt=QWEN_PROMPT),
}


def preset_names() -> list[str]:
    """The names of all presets."""
    return list(_PRESETS)


def preset(name: str) -> MicroVLMConfig:
    """The configuration of a named preset. Raises UserError for an unknown name."""
    if name not in _PRESETS:
        raise UserError(f"unknown preset '{name}'; choose one of {', '.join(_PRESETS)}.")
    return _PRESETS[name]
