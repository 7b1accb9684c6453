"""README.md and example.py of a bundle: the program runs without this package and is the same model, bit for bit."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from microvlm.backends import load, native
from microvlm.exporters import contract
from microvlm.exporters.bundle_example import Bundle
from microvlm.facts import FactMemory
from microvlm.generation import GenerationOptions
from microvlm.processor import Processor

WITHOUT = """
import runpy, sys
sys.modules["microvlm"] = sys.modules["torch"] = None  # importing them is an error now
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
    told = example("tell", picture, "whose is this?", "anna")
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    facts.write("anna", "whose is this?", picture)
    state = np.load(tmp_path / "facts.npz")
    assert np.array_equal(state["mean"], facts.memory.states[0].mean)
    assert np.array_equal(state["covariance"], facts.memory.states[0].covariance)

    options = GenerationOptions(facts.processor.max_new_tokens, stop_tokens=facts.processor.stop_tokens)
    found = facts.read("who owns this?", picture, options)
    asked = example("ask", picture, "who owns this?")
    assert asked.stdout == f"{found.answer}\n(scope {found.scope:.4f})\n", asked.stderr

    assert example("forget", picture, "whose is this?").returncode == 0
    facts.forget(0)
    state = np.load(tmp_path / "facts.npz")
    assert np.array_equal(state["mean"], facts.memory.states[0].mean)
    assert "nothing was told" in example("forget", picture, "whose is this?").stderr


def test_without_a_memory_it_says_what_the_package_says(example, picture, speaking_bundle):
    from microvlm.cli import caption_one

    runtime = load("ort", speaking_bundle, threads=1)
    processor = Processor.from_pretrained(speaking_bundle)
    options = GenerationOptions(processor.max_new_tokens, stop_tokens=processor.stop_tokens)
    said = caption_one(runtime, processor, str(picture), None, options, None, None)["caption"]
    answered = example("ask", picture)
    assert answered.stdout == f"{said.strip()}\n", answered.stderr
    kernels = native.library_path()
    if kernels is not None:
        assert example("--kernels", kernels, "ask", picture).stdout == answered.stdout


def test_a_mistake_is_one_sentence(example, picture):
    for arguments in (("tell", picture), ("tell", picture, "whose?"), ("forget", picture), ("sing", picture)):
        done = example(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_it_reads_pictures_and_text_as_the_package_does(speaking_bundle, picture, facts):
    bundle, processor = Bundle(speaking_bundle), facts.processor
    assert np.array_equal(bundle.pixels(picture)[0], processor.pixels(picture))
    said = "  Whose  is THIS? ..."
    assert bundle.fold(said) == processor.fold(said) == said
    bundle.words = {**bundle.words, "fold_text": True}
    assert bundle.fold(said) == "whose is this?"


def test_the_page_names_every_tensor_and_its_sizes(speaking_bundle, facts):
    page = (speaking_bundle / "README.md").read_text()
    named = set(re.findall(r"`([\w.]+)`", page))
    config = facts.runtime.config
    for spec in contract.graphs(config):
        assert spec.name in named
        for tensor in (*spec.inputs, *spec.outputs):
            assert tensor.name in named or f"{tensor.name.partition('.')[0]}.LAYER.key" in named
    for number in (
        config.memory.slots,
        config.memory.code_size,
        config.prefix_tokens,
        config.text.vocab_size,
    ):
        assert str(number) in page
    assert "{" not in page.replace("{prompt}", "")


def test_a_bundle_without_a_tokenizer_has_no_program_that_needs_one(tiny_bundle):
    assert not (tiny_bundle / "example.py").exists()
    assert "has no tokenizer" in (tiny_bundle / "README.md").read_text()
