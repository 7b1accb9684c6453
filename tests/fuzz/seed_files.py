"""The right files that mutants are made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
_VISION = {
    "model_type": "deit",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "num_channels": 3,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
_TEXT = {
    "model_type": "qwen2",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
_PREPROCESSOR = {
    "image_processor_type": "DeiTImageProcessor",
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"height": 32, "width": 32},
}


def write_seeds(folder: Path, bundle: Path) -> None:
    """Write every right file below `folder`; `bundle` is an exported `nano`."""
    folder.mkdir(parents=True)
    shutil.copytree(bundle, folder / "bundle")
    nano = Path(str(resources.files("microvlm").joinpath("checkpoints", "nano")))
    shutil.copytree(nano, folder / "checkpoint")
    _pictures(folder / "pictures")
    _memories(folder / "memory", folder / "bundle")
    for name, documents in {"vision": _VISION, "text": _TEXT}.items():
        (folder / "huggingface" / name).mkdir(parents=True)
        (folder / "huggingface" / name / "config.json").write_text(json.dumps(documents))
    (folder / "huggingface" / "vision" / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR))
    _parts(folder / "parts")
    packaged = resources.files("microvlm.training").joinpath("recipes", "nano.json")
    (folder / "recipe.json").write_text(packaged.read_text())
    shutil.copytree(REPOSITORY / "bench" / "pi" / "profiles", folder / "profiles")
    shutil.copytree(REPOSITORY / "docs" / "results", folder / "reports")
    picture = next((folder / "pictures").glob("*.png"))
    example = [sys.executable, str(folder / "bundle" / "example.py"), "tell", str(picture), "who?", "anna"]
    subprocess.run(example, cwd=folder, check=True, capture_output=True)


def _parts(folder: Path) -> None:
    """A GGUF decoder with F32, F16 and Q8_0 tensors and a tokenizer, and an encoder with pickled weights."""
    import gguf
    import torch

    from microvlm.formats.weight_shapes import weight_shapes
    from microvlm.model.pretrained.gguf_weights import _LAYER, _TOP
    from microvlm.model.pretrained.part_tensors import _vision_name

    text, vision = fuzzed_configs()
    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text(json.dumps(_VISION))
    generator = torch.Generator().manual_seed(0)
    shapes = weight_shapes(vision)
    tensors = {
        _vision_name(name.removeprefix("vision."), True): torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if name.startswith("vision.")
    }
    torch.save(tensors, encoder / "pytorch_model.bin")
    writer = gguf.GGUFWriter(str(folder / "decoder.gguf"), "llama")
    for key, value in _LLAMA.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*map(chr, range(33, 127)), "ab", "<|end|>"])
    writer.add_token_types([1] * 95 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(95)
    theirs = {ours: name for name, ours in (_TOP | _LAYER).items()}
    for name, shape in weight_shapes(text).items():
        if not name.startswith(("decoder.", "embedding.")):
            continue
        ours = name.removeprefix("decoder.").removesuffix(".weight")
        if name == "embedding.weight" or name == "decoder.norm.weight":
            full = theirs["model.embed_tokens.weight" if "embedding" in name else "model.norm.weight"]
        else:
            _, index, part = ours.split(".", 2)
            full = f"blk.{index}.{theirs[part]}.weight"
        kind = gguf.GGMLQuantizationType.F32
        if "up_proj" in name:
            kind = gguf.GGMLQuantizationType.F16
        elif "gate_proj" in name or "q_proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
        values = torch.randn(shape, generator=generator).numpy()
        writer.add_tensor(full, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_LLAMA = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 16,
    "rope.freq_base": 10_000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def fuzzed_configs() -> tuple[Any, Any]:
    """The configurations of a MicroVLM with the decoder of `_LLAMA`, and of one with the encoder of `_VISION`."""
    from microvlm.config import MemoryConfig, MicroVLMConfig, TextConfig, VisionConfig

    text = TextConfig(96, 32, 1, 2, 1, 16, 32, 1e-5, 10_000.0, False, False, 64)
    vision = VisionConfig(32, 8, 48, 2, 2, 96, 1e-12, True)
    memory = MemoryConfig(slots=1, code_size=2)
    return MicroVLMConfig(text=text, memory=memory, prefix_tokens=1), MicroVLMConfig(
        vision=vision, memory=memory, prefix_tokens=1
    )


def _pictures(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (24, 40, 4), np.uint8))
    rgb, grey = colours.convert("RGB"), colours.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "rgb.png", exif=exif)
    colours.save(folder / "rgba.png")
    rgb.quantize(16).save(folder / "palette.png", transparency=3)
    Image.fromarray(rng.integers(0, 65536, (24, 40), np.uint16)).save(folder / "grey16.png")
    rgb.save(folder / "rgb.jpg", exif=exif)
    rgb.save(folder / "progressive.jpg", progressive=True)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.save(folder / "one.gif")
    rgb.save(folder / "two.gif", save_all=True, append_images=[grey.convert("RGB")])
    rgb.save(folder / "lossy.webp", exif=exif)
    colours.save(folder / "lossless.webp", lossless=True)
    rgb.save(folder / "rgb.bmp")
    grey.save(folder / "grey.bmp")
    rgb.save(folder / "raw.tif", tiffinfo={0x0112: 6})
    rgb.save(folder / "lzw.tif", compression="tiff_lzw")
    grey.point(lambda value: value * 257, "I").convert("I;16").save(folder / "grey16.tif")
    rgb.save(folder / "rgb.ppm")
    grey.save(folder / "grey.ppm")
    colours.save(folder / "icon.ico", sizes=[(16, 16)])


def _memories(folder: Path, bundle: Path) -> None:
    import microvlm
    from microvlm.memory.memory_file import store_memory

    def store(name: str) -> None:
        store_memory(facts.memory, folder / name, facts.runtime.fingerprint)

    folder.mkdir()
    facts = microvlm.FactMemory(microvlm.load(bundle, backend="ort"))
    facts.save(folder / "empty.mem")
    facts.write("anna", "who is it?")
    store("two.mem")
    facts.write("blue", "what colour is it?", np.zeros((8, 8, 3), np.uint8), "black.png")
    facts.write("seven o'clock", "when?")
    store("two.mem")  # one record behind the first part
    facts.write("eight o'clock", "when?")
    store("two.mem")  # and another
    facts.forget(1)
    facts.save(folder / "forgotten.mem")
