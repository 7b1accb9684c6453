"""The adapters of `microvlm-bench peers` on the real llama.cpp and onnxruntime-genai: `nox -s peers`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from microvlm.bench.peers.contender_list import given_contenders
from microvlm.bench.peers.peer_turns import PeerPlan, take_turns
from microvlm.bench.peers.peer_worker import PeerWorker
from microvlm.bench.peers.random_gguf import write_random_gguf
from microvlm.config import TextConfig
from microvlm.errors import UserError
from microvlm.presets import preset


def shape(biases: bool) -> TextConfig:
    changes = {"sub_norm": False, "attention_bias": biases, "vocab_size": 400}
    return dataclasses.replace(preset("nano").text, **changes)


def load(path: Path) -> tuple[PeerWorker, dict]:
    worker = PeerWorker()
    options = {"file": str(path), "vocabulary": 400}
    request = {"do": "load", "adapter": "llama.cpp", "threads": 1, "prompt_tokens": 64, "options": options}
    return worker, worker.answer(request)


@pytest.mark.parametrize("biases", [True, False], ids=["qwen2", "llama"])
@pytest.mark.parametrize("kind", ["Q4_0", "TQ2_0", "TQ1_0"])
def test_llama_cpp_runs_a_file_with_random_weights(biases, kind, tmp_path):
    path = tmp_path / "random.gguf"
    write_random_gguf(path, shape(biases), kind)
    worker, loaded = load(path)
    assert loaded["version"].startswith("xllamacpp ")
    assert loaded["kernels"].startswith("compiled for ")
    prompt = worker.answer({"do": "round", "new_tokens": 0})
    assert prompt["prefill_ms"] > 0
    assert prompt["decode_ms"] is None
    assert worker.answer({"do": "round", "new_tokens": 5})["decode_ms"] > 0


def test_llama_cpp_refuses_what_is_no_gguf_file(tmp_path):
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF and nothing else")
    with pytest.raises(UserError, match=r"llama\.cpp cannot load"):
        load(path)


def test_genai_is_timed_beside_ours_on_one_bundle():
    bundle = os.environ["BUNDLE"]
    contenders, _, _ = given_contenders([bundle], [], None, False, print)
    runs = take_turns(contenders, PeerPlan((1,), 2, 3))
    assert [(run.contender.adapter, run.status, run.reason) for run in runs] == [
        ("bundle", "ok", None),
        ("genai", "ok", None),
    ]
    assert runs[0].loaded.kernels == runs[1].loaded.kernels
    assert all(len(run.milliseconds["decode"]) == 2 for run in runs)
