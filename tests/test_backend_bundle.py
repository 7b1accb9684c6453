"""One bundle on both backends: the same weights, close logits, and a sentence for every kind of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from onnxruntime import OrtValue

from microvlm.backends import load
from microvlm.backends.ort import run_values
from microvlm.errors import UserError
from microvlm.formats import bundle as bundle_format
from microvlm.formats.bundle import open_bundle
from microvlm.formats.onnx_weights import read_initializers
from microvlm.generation import GenerationOptions, embed_prompt, generate, read_slot, teacher_force

BACKENDS = ("ort", "torch")
ANSWERS = np.array([[5, 60, 7, 120], [200, 9, 9, 31]])
ROUNDING_FLIP = 0.1
"""A float sum that ends within rounding of a .5 tie may give another int8 activation elsewhere; with random
weights that moves logits by some percent of their spread (measured here: up to 1 %). A wrong weight, position, mask or
scale moves them by their whole spread."""


@pytest.fixture(scope="module")
def runtimes(speaking_bundle):
    return {name: load(name, speaking_bundle, threads=1) for name in BACKENDS}


@pytest.fixture
def copy(speaking_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(speaking_bundle, tmp_path / "bundle"))


def close(array: np.ndarray, reference: np.ndarray) -> bool:
    return array.shape == reference.shape and bool(
        np.abs(array - reference).max() < ROUNDING_FLIP * array.std()
    )


def test_both_backends_give_the_same_prefix_embeddings_and_tokens(runtimes, tiny_processor):
    inputs = tiny_processor(["what?"], [[np.full((20, 50, 3), 90, np.uint8)]])
    torch, ort = runtimes["torch"], runtimes["ort"]
    assert np.array_equal(torch.embed_tokens(inputs.input_ids), ort.embed_tokens(inputs.input_ids))
    assert close(torch.encode_image(inputs.pixel_values), ort.encode_image(inputs.pixel_values))


def test_both_backends_give_the_same_logits_with_and_without_a_memory(runtimes, tiny_processor):
    picture = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    inputs = tiny_processor(["what is this?", "a"], [[picture], []])
    logits = {}
    for name, runtime in runtimes.items():
        prompt = embed_prompt(runtime, *inputs, tiny_processor.image_id)
        latent, key = runtime.memory_encode(*prompt)
        memory = runtime.memory_write(key[:1], latent[:1], runtime.memory_prior())
        open_slot = read_slot(runtime, prompt, memory)._replace(slot_mask=np.ones(2, np.int64))
        logits[name] = [
            teacher_force(runtime, prompt, ANSWERS, slot)
            for slot in (read_slot(runtime, prompt, None), open_slot)
        ]
    for torch_logits, ort_logits in zip(logits["torch"], logits["ort"], strict=True):
        assert close(torch_logits, ort_logits)
    assert not close(*logits["ort"])


def test_both_backends_give_an_answer_the_same_log_probability(runtimes, tiny_processor):
    inputs = tiny_processor(["what is this?", "a"], [[np.full((20, 50, 3), 90, np.uint8)], []])
    results = {
        name: generate(
            runtime,
            embed_prompt(runtime, *inputs, tiny_processor.image_id),
            GenerationOptions(max_new_tokens=6),
        )
        for name, runtime in runtimes.items()
    }
    torch, ort = results["torch"], results["ort"]
    assert torch.tokens == ort.tokens
    assert [len(row) for row in ort.log_probabilities] == [6, 6]
    assert close(np.array(torch.log_probabilities), np.array(ort.log_probabilities))


def test_a_cache_built_token_by_token_gives_the_logits_of_one_prefill(runtimes):
    ids = np.array([[4, 77, 130, 12, 250]])
    for runtime in runtimes.values():
        embeds, ones = runtime.embed_tokens(ids), np.ones((1, 5), np.int64)
        mask = np.concatenate([np.zeros((1, 1), np.int64), ones], 1)
        prefill_logits, _ = runtime.decode(embeds, mask, ones.cumsum(1), runtime.empty_slot(1), 5)
        past, steps = runtime.empty_slot(1), []
        for at in range(5):
            step, past = runtime.decode(embeds[:, at : at + 1], mask[:, : at + 2], np.array([[at + 1]]), past)
            steps.append(step)
        assert close(prefill_logits, np.concatenate(steps, 1))


def test_both_backends_write_read_and_forget_alike(runtimes):
    rng = np.random.default_rng(0)
    key, latent = (rng.normal(size=(1, width)).astype(np.float32) for width in (16, 48))
    key, latent = key / np.linalg.norm(key), latent / np.linalg.norm(latent)
    states = {}
    for name, runtime in runtimes.items():
        prior = runtime.memory_prior()
        written_state = runtime.memory_write(key, latent, prior)
        forgotten = runtime.memory_forget(key, latent, written_state)
        assert np.abs(forgotten.mean - prior.mean).max() < 1e-3
        states[name] = [*prior, *written_state, runtime.memory_read(key, latent, written_state).latent]
    for torch_array, ort_array in zip(states["torch"], states["ort"], strict=True):
        assert np.abs(torch_array - ort_array).max() < 1e-5


def test_a_run_on_values_gives_what_onnx_runtime_gives_on_arrays(speaking_bundle):
    runtime = load("ort", speaking_bundle, threads=1)
    session = runtime.session("embed_tokens")
    ids = np.array([[5, 6, 7]])
    (value,) = run_values(session, ["input_ids"], [OrtValue.ortvalue_from_numpy(ids)], ["inputs_embeds"])
    (again,) = run_values(session, ["input_ids"], [OrtValue.ortvalue_from_numpy(ids + 1)], ["inputs_embeds"])
    assert np.array_equal(value.numpy(), session.run(None, {"input_ids": ids})[0])
    assert np.array_equal(again.numpy(), session.run(None, {"input_ids": ids + 1})[0])
    assert tuple(value.shape()) == value.numpy().shape


def test_both_backends_carry_the_fingerprint_of_the_checkpoint(runtimes, speaking_checkpoint):
    prints = {runtime.fingerprint for runtime in runtimes.values()}
    assert prints == {load("torch", speaking_checkpoint).fingerprint}
    assert len(prints.pop()) == 16


def test_the_checkpoint_and_the_bundle_compute_the_same_on_torch(runtimes, speaking_checkpoint):
    ids = np.array([[4, 77, 130]])
    outputs = []
    for runtime in (runtimes["torch"], load("torch", speaking_checkpoint)):
        mask = np.array([[0, 1, 1, 1]])
        outputs.append(
            runtime.decode(runtime.embed_tokens(ids), mask, np.array([[1, 2, 3]]), runtime.empty_slot(1), 3)[
                0
            ]
        )
    assert np.array_equal(*outputs)


def test_the_wire_reader_finds_what_onnx_finds(speaking_bundle):
    onnx = pytest.importorskip("onnx")
    for entry in open_bundle(speaking_bundle).graphs.values():
        path = speaking_bundle / entry.file
        expected = {
            t.name: tuple(t.dims) for t in onnx.load(str(path), load_external_data=False).graph.initializer
        }
        assert {t.name: t.shape for t in read_initializers(path)} == expected


ENTRY = {"bytes": 1, "sha256": "0" * 64}


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", [remove, truncate, alter])
@pytest.mark.parametrize(
    "file",
    [
        "onnx/decoder_model_merged.data",
        "onnx/vision_encoder.onnx",
        "tokenizer.json",
        "memory_prior.safetensors",
    ],
)
def test_a_damaged_file_of_a_bundle_is_named(backend, damage, file, copy):
    damage(copy / file)
    with pytest.raises(UserError) as error:
        load(backend, copy)
    assert str(copy / file) in str(error.value)
    assert "\n" not in str(error.value)


def test_small_files_of_a_large_bundle_are_hashed_and_its_weights_on_request(copy, monkeypatch):
    monkeypatch.setattr(bundle_format, "HASH_BELOW_BYTES", 0)
    monkeypatch.setattr(bundle_format, "SMALL_FILE_BYTES", 20_000)
    alter(copy / "onnx/vision_encoder.data")
    open_bundle(copy)
    with pytest.raises(UserError, match="was altered"):
        open_bundle(copy, verify=True)
    alter(copy / "memory_prior.safetensors")
    with pytest.raises(UserError, match=r"memory_prior\.safetensors was altered"):
        open_bundle(copy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_is_no_graph_is_named_even_without_hashes(backend, copy):
    path = copy / open_bundle(copy).graphs["vision_encoder"].file
    path.write_bytes(b"\x99" * path.stat().st_size)
    with pytest.raises(UserError) as error:
        load(backend, copy, verify=False).encode_image(np.zeros((1, 3, 32, 32), np.float32))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda manifest: manifest.update(format=99), "newer microvlm"),
        (lambda manifest: manifest.update(format=1), "older microvlm"),
        (lambda manifest: manifest.pop("files"), "'files' is missing"),
        (
            lambda manifest: manifest["files"].update({"../x": ENTRY}),
            "'../x' in 'files' is no path",
        ),
        (
            lambda manifest: manifest["files"].pop("onnx/vision_encoder.onnx"),
            "lacks 'onnx/vision_encoder.onnx'",
        ),
        (
            lambda manifest: manifest.update(graphs={"vision_encoder": 5}),
            "must be an object, not a whole number",
        ),
        (lambda manifest: manifest["graphs"]["embed_tokens"].pop("inputs"), r"inputs' is missing"),
        (lambda manifest: manifest.update(lowered={"scope.fc1": {}}), r"kind' is missing"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(change, sentence, copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=sentence):
        open_bundle(copy)


def test_a_cut_or_missing_manifest_is_refused(copy):
    truncate(copy / "manifest.json")
    with pytest.raises(UserError, match=r"manifest.json is not valid JSON: copy or export the bundle again"):
        load("ort", copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json is missing"):
        open_bundle(copy)
