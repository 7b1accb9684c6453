"""The right files that mutants are made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

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
    packaged = resources.files("microvlm.training").joinpath("recipes", "nano.json")
    (folder / "recipe.json").write_text(packaged.read_text())
    shutil.copytree(REPOSITORY / "bench" / "pi" / "profiles", folder / "profiles")
    shutil.copytree(REPOSITORY / "docs" / "results", folder / "reports")
    picture = next((folder / "pictures").glob("*.png"))
    example = [sys.executable, str(folder / "bundle" / "example.py"), "tell", str(picture), "who?", "anna"]
    subprocess.run(example, cwd=folder, check=True, capture_output=True)


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
