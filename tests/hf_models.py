"""Small decoders and vision encoders in the directories of Hugging Face, made by transformers with random weights."""

import dataclasses

import pytest
import torch
from conftest import FLOAT, tiny_config
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
BASE = dataclasses.replace(tiny_config(FLOAT), text=dataclasses.replace(tiny_config().text, sub_norm=False))
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}


def save_livened(model: torch.nn.Module, directory, **options) -> torch.nn.Module:
    """Random biases and norms too (transformers starts them at 0 and 1), so that a swapped one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(directory, **options)
    return model


def qwen2(directory, **changes):
    torch.manual_seed(1)
    options = {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    }
    config = transformers.Qwen2Config(vocab_size=120, hidden_size=64, **{**SMALL, **options, **changes})
    return save_livened(transformers.Qwen2ForCausalLM(config), directory)


def llama(directory, **changes):
    torch.manual_seed(2)
    options = {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    config = transformers.LlamaConfig(vocab_size=90, hidden_size=64, **{**SMALL, **options, **changes})
    return save_livened(transformers.LlamaForCausalLM(config), directory)


def vit_options(**changes):
    return {"hidden_size": 48, "image_size": 24, "patch_size": 8, **SMALL, **changes}


def vit(directory, **changes):
    torch.manual_seed(3)
    return save_livened(transformers.ViTModel(transformers.ViTConfig(**vit_options(**changes))), directory)


def deit(directory, **changes):
    torch.manual_seed(4)
    return save_livened(transformers.DeiTModel(transformers.DeiTConfig(**vit_options(**changes))), directory)


def altered(folder, target, drop=(), add=None):
    """A copy of `folder` with tensors taken out or put in."""
    tensors = load_file(folder / "model.safetensors")
    target.mkdir()
    save_file({k: v for k, v in tensors.items() if k not in drop} | (add or {}), target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def make_folders(root) -> dict[str, torch.nn.Module]:
    """A folder each below `root` -> the models in them, by folder."""
    return {
        name: make(root / name)
        for name, make in {"qwen2": qwen2, "llama": llama, "vit": vit, "deit": deit}.items()
    }
