"""README.md and example.py of a bundle: the program runs without this package and is the same model, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from picture_files import SIDE, table
from PIL import Image

from microvlm.backends import load, native
from microvlm.exporters import contract
from microvlm.exporters.bundle_readme import write_readme
from microvlm.exporters.elsewhere.example import Bundle, Refusal, about, read_square
from microvlm.formats.manifest import MANIFEST, sha256
from microvlm.formats.weight_format import WeightFormat
from microvlm.generation import GenerationOptions
from microvlm.inputs.images import load_square
from microvlm.inputs.processor import Processor
from microvlm.memory.facts import FactMemory

WITHOUT = """
import runpy, sys
sys.modules["microvlm"] = sys.modules["torch"] = None  # importing them is an error now
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def copy_of(bundle: Path, tmp_path: Path, name: str, **keys: object) -> Path:
    """A copy of a bundle in which `keys` of the document `name` are changed, listed with its new size and hash."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    path, manifest = folder / name, folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    document = json.loads(manifest.read_text())
    document["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest.write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Neither square nor small nor opaque, so that every step of scaling counts."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pictures") / "glass.png"
    Image.fromarray(rng.integers(0, 256, (211, 157, 4), np.uint8)).save(path)
    return path


@pytest.fixture
def example(speaking_bundle, tmp_path):
    """Arguments -> the finished program, in a folder of its own."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", WITHOUT, str(speaking_bundle / "example.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def facts(speaking_bundle):
    return FactMemory(load("ort", speaking_bundle, threads=1), Processor.from_pretrained(speaking_bundle))


def test_a_fact_is_told_asked_for_and_forgotten_with_the_packages_bits(example, facts, picture, tmp_path):
    facts.reset()
    tell_process = example("tell", picture, "whose is this?", "anna")
    assert (tell_process.returncode, tell_process.stdout, tell_process.stderr) == (0, "", "")
    facts.write("anna", "whose is this?", picture)
    state = np.load(tmp_path / "facts.npz")
    assert np.array_equal(state["mean"], facts.memory.states[0].mean)
    assert np.array_equal(state["covariance"], facts.memory.states[0].covariance)

    options = GenerationOptions(facts.processor.max_new_tokens, stop_tokens=facts.processor.stop_tokens)
    reading = facts.read("who owns this?", picture, options, source="decoder")
    ask_process = example("ask", picture, "who owns this?")
    assert ask_process.stdout == f"{reading.answer}\n(scope {reading.scope:.4f})\n", ask_process.stderr

    assert example("forget", picture, "whose is this?").returncode == 0
    facts.forget(0)
    state = np.load(tmp_path / "facts.npz")
    assert np.array_equal(state["mean"], facts.memory.states[0].mean)
    assert "no fact is stored" in example("forget", picture, "whose is this?").stderr


def test_without_a_memory_it_says_what_the_package_says(example, picture, speaking_bundle):
    from microvlm.commands.caption import caption_one

    runtime = load("ort", speaking_bundle, threads=1)
    processor = Processor.from_pretrained(speaking_bundle)
    options = GenerationOptions(processor.max_new_tokens, stop_tokens=processor.stop_tokens)
    caption = caption_one(runtime, processor, str(picture), None, options, None)["caption"]
    process = example("ask", picture)
    assert process.stdout == f"{caption.strip()}\n", process.stderr
    kernels = native.library_path()
    if kernels is not None:
        assert example("--kernels", kernels, "ask", picture).stdout == process.stdout


def test_a_mistake_is_a_sentence_and_leaves_nothing(example, picture, tmp_path):
    for arguments, words in (
        (("tell", picture), "tell needs a question and a text"),
        (("tell", picture, "whose?"), "tell needs a question and a text"),
        (("forget", picture), "forget a question"),
        (("forget", picture, "whose?"), "no fact is stored"),
        (("sing", picture), "invalid choice"),
        (("ask", picture, "whose <image>?"), "leave '<image>' out"),
        (("tell", picture, "whose?", "anna <|end|>"), "leave '<|end|>' out"),
        (("ask", picture, "whose? " * 200), "shorten the text"),
        (("tell", picture, "\udcff?", "anna"), "not valid Unicode"),
        (("ask", picture.parent), f"{picture.parent} cannot be used: Is a directory"),
        (("ask", "none.png"), "none.png cannot be used: No such file"),
        (("ask", __file__), "cannot identify image file"),
        (("--kernels", __file__, "ask", picture), "test_bundle_example.py"),
    ):
        process = example(*arguments)
        assert process.returncode == 2
        assert process.stdout == ""
        assert words in process.stderr
        assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_reads_pictures_and_text_as_the_package_does(speaking_bundle, picture, facts):
    bundle, processor = Bundle(speaking_bundle), facts.processor
    assert np.array_equal(bundle.pixels(picture)[0], processor.pixels(picture))
    text = "  Whose  is THIS? ..."
    assert bundle.normalize(text) == processor.normalize_text(text) == text
    bundle.texts = {**bundle.texts, "fold_text": True}
    assert bundle.normalize(text) == "whose is this?"


def test_the_page_names_every_tensor_and_its_sizes(speaking_bundle, facts):
    page = (speaking_bundle / "README.md").read_text()
    names_on_page = set(re.findall(r"`([\w.]+)`", page))
    config = facts.runtime.config
    for spec in contract.graphs(config):
        assert spec.name in names_on_page
        for tensor in (*spec.inputs, *spec.outputs):
            assert (
                tensor.name in names_on_page or f"{tensor.name.partition('.')[0]}.LAYER.key" in names_on_page
            )
    slots, code = config.memory.slots, config.memory.code_size
    for words in (
        f"`memory_mean` [batch, {slots}, {code}]",
        f"`memory_prior` float32 [{slots}, {code}]",
        f"`logits` [batch, kept, {config.text.vocab_size}]",
        f"`{config.prompt.image_token}` {config.prefix_tokens} times",
        f"is at least {config.memory.scope_threshold:g} and 0",
    ):
        assert words in page.replace("\n", " ")
    listed = re.findall(r"^\| `([\w.]+)` \|", page.partition("| graph |")[0], re.M)
    assert {"config.json", "preprocessor_config.json", "tokenizer_tables.safetensors"} < set(listed)
    assert all((speaking_bundle / name).is_file() for name in listed)
    assert "{" not in page.replace("{prompt}", "")


def test_a_bundle_without_a_tokenizer_has_no_program_that_needs_one(tiny_bundle):
    assert not (tiny_bundle / "example.py").exists()
    page = (tiny_bundle / "README.md").read_text()
    assert "has no tokenizer" in page
    assert "microvlm caption" not in page
    assert "tokenizer*.json" not in page


def test_a_page_has_the_numbers_that_the_processor_takes(speaking_bundle, tmp_path, picture, facts):
    copy_of(speaking_bundle, tmp_path, "preprocessor_config.json", image_mean=[0.25, 0.5, 0.75])
    write_readme(tmp_path / "bundle", facts.runtime.config, WeightFormat())
    page = (tmp_path / "bundle" / "README.md").read_text().replace("\n", " ")
    assert "with the mean (0.25, 0.5, 0.75)" in page
    changed_pixels = Processor.from_pretrained(tmp_path / "bundle").pixels(picture)
    assert np.array_equal(Bundle(tmp_path / "bundle").pixels(picture)[0], changed_pixels)
    assert not np.array_equal(changed_pixels, facts.processor.pixels(picture))


def test_nulls_of_a_generation_config_are_its_defaults(speaking_bundle, tmp_path, facts):
    nulls = {"eos_token_id": None, "max_new_tokens": None}
    bundle = Bundle(copy_of(speaking_bundle, tmp_path, "generation_config.json", **nulls))
    assert bundle.stop_ids == {facts.processor.eos_id}
    assert bundle.max_new_tokens == 32


def test_a_large_jpeg_and_a_turned_picture_have_the_packages_pixels(speaking_bundle, tmp_path, facts):
    bundle = Bundle(speaking_bundle)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8))
    smooth = noise.resize((901, 603), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x112] = 6
    for name in ("large.jpg", "turned.png", "turned.jpg"):
        smooth.save(tmp_path / name, exif=exif if "turned" in name else Image.Exif())
        assert np.array_equal(bundle.pixels(tmp_path / name)[0], facts.processor.pixels(tmp_path / name))
        stretched = np.asarray(read_square(tmp_path / name, SIDE, True))
        assert np.array_equal(stretched, np.asarray(load_square(tmp_path / name, SIDE, stretch=True)))


@pytest.mark.parametrize("row", table(), ids=lambda row: row.name)
def test_every_kind_of_picture_has_the_packages_pixels_or_is_refused(row, tmp_path):
    path = tmp_path / row.name
    path.write_bytes(row.content)
    if isinstance(row.expected, str) or row.name.startswith(("float", "int", "uint")):
        with pytest.raises(Refusal) as refusal, about(path):
            read_square(path, SIDE, False)
        assert "\n" not in str(refusal.value)
    else:
        square = np.asarray(read_square(path, SIDE, False))
        assert np.array_equal(square, np.asarray(load_square(path, SIDE)))


@pytest.mark.parametrize(
    "keys",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0},
        {"do_rescale": None, "rescale_factor": None, "image_mean": None, "image_std": None, "resample": None},
    ],
    ids=str,
)
def test_it_computes_a_preprocessors_numbers(keys, speaking_bundle, tmp_path, picture):
    folder = copy_of(speaking_bundle, tmp_path, "preprocessor_config.json", **keys)
    assert np.array_equal(
        Bundle(folder).pixels(picture)[0], Processor.from_pretrained(folder).pixels(picture)
    )


def test_it_refuses_what_it_does_not_compute(speaking_bundle, tmp_path):
    with pytest.raises(Refusal, match="'resample'"):
        Bundle(copy_of(speaking_bundle, tmp_path, "preprocessor_config.json", resample=0))
