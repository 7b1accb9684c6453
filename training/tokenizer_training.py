"""Trains and saves the tokenizer of a model without a pretrained one, a byte-level BPE of captions and questions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from microvlm.atomic import write_file
from microvlm.config import MicroVLMConfig
from microvlm.inputs.tokenizer_tables import TOKENIZER

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|assistant|>", "<image>")
"""Ids 0 to 3, in this order."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same file.

    If the texts allow fewer merges than `vocab_size`, the embedding keeps unused rows.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, config: MicroVLMConfig, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and preprocessor_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    prompt, vision = config.prompt, config.vision
    write_file(directory / TOKENIZER, tokenizer.to_str(pretty=True))
    token_id = {name: tokenizer.token_to_id(name) for name in (prompt.eos_token, prompt.pad_token)}
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": prompt.eos_token,
            "pad_token": prompt.pad_token,
            "additional_special_tokens": [prompt.image_token, "<|assistant|>"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.text.max_position_embeddings,
        },
    )
    _write(
        directory / "generation_config.json",
        {
            "eos_token_id": token_id[prompt.eos_token],
            "pad_token_id": token_id[prompt.pad_token],
            "do_sample": False,
            "max_new_tokens": 32,
        },
    )
    _write(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": vision.image_size, "width": vision.image_size},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
        },
    )


def _write(path: Path, document: dict) -> None:
    write_file(path, json.dumps(document, indent=2) + "\n")
