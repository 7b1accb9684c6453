"""The public names of microvlm: imports, `load`, `export`, and what `generate` accepts on every backend."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import seeded_model, tiny_config
from PIL import Image

import microvlm
from microvlm import Chat, FactMemory, GenerationOptions, LoadedModel, UserError
from microvlm.inputs.processor import Processor
from microvlm.model.microvlm import MicroVLM
from microvlm.sampling import Chooser

RED, BLUE = (np.full((20, 30, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))


@pytest.fixture(scope="module", params=["torch", "ort"])
def model(request: pytest.FixtureRequest, speaking_bundle: Path) -> LoadedModel:
    return microvlm.load(speaking_bundle, backend=request.param, threads=1)


@pytest.fixture
def torch_model(ternary_model: MicroVLM, tiny_processor: Processor) -> LoadedModel:
    return ternary_model.to_loaded_model(tiny_processor)


def png_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def loaded_after(program: str) -> list[str]:
    """Top-level packages that are imported after `program` ran in a process of its own."""
    code = f"import json, sys\n{program}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_importing_microvlm_imports_no_package() -> None:
    heavy = {"torch", "numpy", "onnxruntime", "onnx", "PIL", "tokenizers", "safetensors", "click"}
    assert heavy & set(loaded_after("import microvlm; dir(microvlm)")) == set()


@pytest.mark.parametrize("module", ["microvlm.cli", "microvlm.exporters.export_command"])
def test_a_command_line_starts_and_shows_its_help_without_numpy(module: str) -> None:
    help_page = (
        f"import sys, contextlib, io\nfrom {module} import main\nsys.argv = ['command', '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()"
    )
    for program in (f"import {module}", help_page):
        assert {"numpy", "torch", "PIL", "tokenizers"} & set(loaded_after(program)) == set()


def test_everything_but_the_torch_module_is_imported_without_torch() -> None:
    names = set(microvlm.__all__) - {"MicroVLM"}
    packages = loaded_after(f"from microvlm import {', '.join(sorted(names))}")
    assert "numpy" in packages
    assert {"torch", "onnx", "onnxruntime"} & set(packages) == set()


def test_every_public_name_is_listed_and_an_unknown_one_is_an_attribute_error() -> None:
    assert set(microvlm.__all__) <= set(dir(microvlm))
    for name in microvlm.__all__:
        assert getattr(microvlm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        microvlm.nothing  # noqa: B018


def test_single_values_give_a_string_and_lists_give_lists(model: LoadedModel) -> None:
    red, blue = (model.generate(image, "what?", max_new_tokens=4) for image in (RED, BLUE))
    assert isinstance(red, str)
    assert model.generate([RED, BLUE], "what?", max_new_tokens=4) == [red, blue]
    assert model.generate([RED], "what?", max_new_tokens=4) == [red]
    assert model.generate(RED, ["what?"], max_new_tokens=4) == [red]
    two = model.generate(RED, ["what?", "and this?"], max_new_tokens=4)
    assert two == [red, model.generate(RED, "and this?", max_new_tokens=4)]
    assert model.generate((RED, BLUE), ("what?", "what?"), max_new_tokens=4) == [red, blue]
    assert isinstance(model.generate(prompts="what?", max_new_tokens=4), str)
    caption = model.generate(RED, max_new_tokens=4)
    assert caption == model.generate(RED, model.config.prompt.caption_prompt, max_new_tokens=4)
    (several,) = model.generate([[RED, BLUE]], "what?", max_new_tokens=4)
    assert isinstance(several, str)


def test_every_form_of_an_image_is_the_same_image(torch_model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(png_bytes(RED))
    opaque = np.dstack([RED, np.full(RED.shape[:2], 255, np.uint8)])
    answer = torch_model.generate(RED, max_new_tokens=4)
    with path.open("rb") as file:
        forms = [str(path), path, path.read_bytes(), file, Image.open(path), opaque]
        assert torch_model.generate(forms, max_new_tokens=4) == [answer] * len(forms)
    grey = RED[:, :, 0]
    assert torch_model.generate(grey) == torch_model.generate(np.dstack([grey] * 3))
    transparent = np.zeros((20, 30, 4), np.uint8)
    assert torch_model.generate(transparent) == torch_model.generate(np.full_like(RED, 255))


def test_an_open_file_is_read_once_for_many_prompts(torch_model: LoadedModel) -> None:
    file = io.BytesIO(png_bytes(RED))
    assert torch_model.generate(file, ["what?", "and?"]) == torch_model.generate(RED, ["what?", "and?"])
    with pytest.raises(UserError, match=r"empty .* needs seek\(0\)"):
        torch_model.generate(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give images=, prompts= or both"),
        ({"images": 5}, "images= takes one image"),
        ({"images": [5]}, "an image is a path, .* not int"),
        ({"images": []}, "images= is an empty list"),
        (
            {"images": np.zeros((2, 9, 9, 3), np.uint8)},
            r"not uint8 \[2, 9, 9, 3\]; give several images as a list",
        ),
        ({"images": np.zeros((3, 9, 9))}, r"uint8 \[H, W\], .* not float64 \[3, 9, 9\]"),
        ({"images": np.zeros((9, 9, 2), np.uint8)}, r"not uint8 \[9, 9, 2\]"),
        ({"images": np.zeros((0, 9, 3), np.uint8)}, r"not uint8 \[0, 9, 3\]"),
        ({"images": Image.new("RGB", (0, 4))}, "has no pixels"),
        ({"images": b"no image"}, "is not a picture in a format read here"),
        ({"images": b""}, "is empty"),
        ({"images": io.StringIO("text")}, "open image files in binary mode"),
        ({"images": "missing.png"}, "missing.png does not exist"),
        ({"images": RED, "prompts": 5}, "prompts= takes one text or a list of texts"),
        ({"images": RED, "prompts": ["a", None]}, "prompts= takes one text or a list of texts"),
        ({"images": RED, "prompts": []}, "prompts= is an empty list"),
        ({"images": [RED, BLUE], "prompts": ["a", "b", "c"]}, "images= has 2 entries and prompts= has 3"),
        ({"images": RED, "options": {"seed": 1}}, "options= takes a GenerationOptions, not dict"),
        ({"images": RED, "memory": 5}, "memory= takes a FactMemory, .* not int"),
        ({"images": RED, "memory": "missing.mem"}, "missing.mem does not exist"),
        ({"images": RED, "max_new_tokens": 0}, "--max-new-tokens"),
        ({"images": RED, "max_new_tokens": 1.5}, "--max-new-tokens is 1.5; give a whole number"),
        ({"images": RED, "temperature": "hot"}, "--temperature is 'hot'; give a number"),
        ({"prompts": "a b " * 100}, "more than the 255 of this model; shorten"),
        ({"prompts": "a" * 1_000_000}, "1000000 characters, more than the 255 tokens of this model"),
    ],
)
def test_anything_else_is_one_sentence(
    torch_model: LoadedModel, arguments: dict, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        torch_model.generate(**arguments)


def test_a_prompt_that_is_too_long_is_refused_before_it_is_embedded(
    torch_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(torch_model.runtime), "embed_tokens", None)
    with pytest.raises(UserError, match="shorten it"):
        torch_model.generate(prompts="a b " * 100)


def test_keywords_replace_values_of_the_options(torch_model: LoadedModel) -> None:
    options = GenerationOptions(max_new_tokens=6, temperature=2.0, seed=1)
    assert torch_model.generate(RED, options=options, seed=2) == torch_model.generate(
        RED, max_new_tokens=6, temperature=2.0, seed=2
    )
    assert torch_model.generate(RED, options=options, seed=2) != torch_model.generate(RED, options=options)


def test_stop_tokens_are_the_models_unless_options_give_others_or_none(
    torch_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    unstopped = GenerationOptions(max_new_tokens=4, stop_tokens=())
    answer = torch_model.generate(RED, options=unstopped)
    assert answer
    every_token = tuple(range(torch_model.config.text.vocab_size))
    monkeypatch.setattr(Processor, "stop_tokens", every_token)
    assert torch_model.generate(RED, options=GenerationOptions(max_new_tokens=4)) == ""
    assert torch_model.generate(RED, max_new_tokens=4) == ""
    assert torch_model.generate(RED, options=unstopped) == answer
    assert Chat(torch_model, options=unstopped).ask("what?", RED).tokens != []
    assert FactMemory(torch_model).read("what?", RED, unstopped, "decoder").answer != ""


def test_a_temperature_next_to_zero_takes_the_most_probable_token() -> None:
    logits = np.array([-3.0, 20.0, 19.0], np.float32)
    assert Chooser(GenerationOptions(temperature=1e-320))(logits) == 1


def test_the_torch_module_and_the_loaded_model_share_generate(
    ternary_model: MicroVLM, tiny_processor: Processor, torch_model: LoadedModel
) -> None:
    assert ternary_model.generate(RED, processor=tiny_processor) == torch_model.generate(RED)
    with pytest.raises(UserError, match="pass processor="):
        MicroVLM(ternary_model.config).generate(RED)


def test_a_chat_knows_new_images_and_forgets_them_on_reset(model: LoadedModel) -> None:
    chat = Chat(model, options=GenerationOptions(max_new_tokens=3))
    for image in (RED, BLUE, RED):
        chat.ask("what is this?", image)
    questions = [entry.question for entry in chat.memory.entries]
    first, second, asked = "what was in the first image?", "what was in the second image?", "what is this?"
    assert questions == [first, asked, second, asked, asked]
    chat.reset()
    chat.ask("what is this?", RED)
    assert [entry.question for entry in chat.memory.entries] == [first, asked]


def test_facts_are_read_by_generate_from_a_memory_or_its_file(model: LoadedModel, tmp_path: Path) -> None:
    facts = FactMemory(model)
    facts.write("anna", "whose is this?", RED)
    facts.save(tmp_path / "facts.mem")
    answer = facts.read("whose is this?", RED, source="decoder").answer
    for memory in (facts, facts.memory, facts.memory.states, facts.memory.states[0], tmp_path / "facts.mem"):
        assert model.generate(RED, "whose is this?", memory=memory) == answer


def test_the_memory_of_another_model_is_refused(torch_model: LoadedModel) -> None:
    other_memory = FactMemory(seeded_model(tiny_config(), seed=1), torch_model.processor)
    with pytest.raises(UserError, match="belongs to another model"):
        torch_model.generate(RED, memory=other_memory)


@pytest.mark.parametrize("kind", [Chat, FactMemory])
def test_a_memory_is_built_from_every_kind_of_model(
    kind: type, ternary_model: MicroVLM, torch_model: LoadedModel
) -> None:
    runtime, processor = torch_model.runtime, torch_model.processor
    assert kind(torch_model).runtime is runtime
    assert kind(runtime, processor).processor is processor
    assert kind(ternary_model, processor).runtime.fingerprint == runtime.fingerprint
    with pytest.raises(UserError, match=r"as microvlm\.load .* returns it, not str"):
        kind("nano")


@pytest.mark.export
def test_export_gives_a_bundle_that_loads(speaking_checkpoint: Path, tmp_path: Path) -> None:
    bundle = microvlm.export(speaking_checkpoint, tmp_path / "bundle", packing="base3")
    assert bundle == tmp_path / "bundle"
    assert type(microvlm.load(bundle).runtime).__name__ == "OrtRuntime"
    with pytest.raises(UserError, match="exists"):
        microvlm.export(speaking_checkpoint, bundle)
    with pytest.raises(UserError, match="bits"):
        microvlm.export(speaking_checkpoint, tmp_path / "other", bits=3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"bits": "1.58"}, r"--bits '1\.58' is not offered; choose one of 32, 16"),
        ({"bits": None}, "--bits None is not offered"),
        ({"bits": True}, "--bits 1 is not offered"),
        ({"embedding_bits": "8"}, "--embedding-bits '8' is not offered"),
        ({"packing": 2}, "--packing 2 is not offered; choose 2bit or base3"),
        ({"packing": ["2bit"]}, "is not offered; choose 2bit or base3"),
        ({"source": 5}, "source= is 5; give a folder"),
        ({"output": None}, "output= is None; give a folder"),
    ],
)
def test_export_refuses_values_of_other_types_in_one_sentence(
    arguments: dict, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        microvlm.export(**{"source": "nano", "output": tmp_path / "bundle", **arguments})


def test_load_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        microvlm.load(tmp_path / "missing")
    with pytest.raises(UserError, match="source= is 5; give a folder"):
        microvlm.load(5)
