"""`microvlm-bench peers` on a small bundle: the plan of turns, real programs, those that are missing, bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import FLOAT, seeded_model, tiny_config

from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.page.page_charts import charts_of
from microvlm.bench.peers import contender_list, peer_turns, peers_bench
from microvlm.bench.peers.peer_turns import Contender, PeerPlan, PeerRun, Turn, take_turns, turns
from microvlm.bench.peers.peer_worker import PeerWorker
from microvlm.bench.peers.random_gguf import write_random_gguf
from microvlm.bench.peers.torch_peer import TorchPeer
from microvlm.bench.speed.speed_bench import bytes_read_per_token
from microvlm.errors import UserError
from microvlm.formats.headers.gguf_header import read_gguf_header
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.lowering import lower
from microvlm.model.torch_runtime import TorchRuntime


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A float checkpoint in the shape of `tiny_bundle`."""
    folder = tmp_path_factory.mktemp("peers") / "tiny-float"
    seeded_model(tiny_config(FLOAT)).save_pretrained(folder)
    return folder


def test_each_phase_of_a_round_goes_through_all_programs_and_each_round_begins_with_another():
    plan = list(turns(3, 4))
    assert plan[:6] == [Turn(0, phase, place) for phase in ("prefill", "decode") for place in (0, 1, 2)]
    first = [turn.place for turn in plan if turn.phase == "decode"][::3]
    assert first == [0, 1, 2, 0]
    assert set(Counter((turn.phase, turn.place) for turn in plan).values()) == {4}


@pytest.mark.linux
def test_onnx_runtime_and_torch_are_measured_and_what_is_not_installed_says_so(tiny_bundle, checkpoint):
    arguments = ["peers", str(tiny_bundle), "--checkpoint", str(checkpoint), "--gguf", "Q4_0"]
    arguments += ["--threads", "1", "--rounds", "2", "--new-tokens", "3", "--no-compiled", "--json"]
    if importlib.util.find_spec("gguf") is not None:
        # A decoder with SubLN has no GGUF: that is a mistake, and not a missing package.
        refused = CliRunner().invoke(command, arguments)
        assert isinstance(refused.exception, UserError)
        assert "GGUF has no decoder with norms" in str(refused.exception)
        arguments = [word for word in arguments if word not in ("--gguf", "Q4_0")]
    result = CliRunner().invoke(command, arguments)
    document = json.loads(result.stdout)
    rows = {row["name"]: row for row in document["rows"]}
    ours = rows["MicroVLM, 1.58 bits"]
    assert ours["is_ours"] is True
    assert ours["weight_bytes_per_token"] == bytes_read_per_token(tiny_bundle)
    for name in ("MicroVLM, 1.58 bits", "PyTorch eager, float32", "PyTorch eager, bfloat16"):
        row = rows[name]
        assert (row["status"], row["reason"]) == ("ok", None), row
        assert row["decode_tokens_per_s"]["value"] > 0
        assert row["decode_tokens_per_s"]["low"] <= row["decode_tokens_per_s"]["value"]
        assert row["peak_rss_bytes"] > 10_000_000
        assert [len(row["samples_ms"][phase]) for phase in ("prefill", "decode")] == [2, 2]
    text = tiny_config().text
    floats = seeded_model(tiny_config(FLOAT))
    count = sum(weight.numel() for part in (floats.decoder, floats.embedding) for weight in part.parameters())
    assert rows["PyTorch eager, float32"]["weight_bytes_per_token"] == 4 * count
    half = rows["PyTorch eager, bfloat16"]["weight_bytes_per_token"]
    assert 2 * count < half < 2 * count + 4 * 20 * text.hidden_size
    compared = {(row["name"], row["phase"]) for row in document["ratios"]}
    assert ("PyTorch eager, float32", "decode") in compared
    assert all(row["against"] == ours["name"] != row["name"] for row in document["ratios"])
    read = report.read_report(document)
    assert [table.name for table in read.tables] == ["threads-1", "ratios-1", "programs"]
    assert "PyTorch eager, float32" in read.text()
    assert len(charts_of("peers", document)) == 2


def test_the_torch_peer_computes_what_the_model_computes(checkpoint):
    model = seeded_model(tiny_config(FLOAT))
    tokens = torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(1))
    embeds, mask = model.embed(tokens), torch.ones((1, 10), dtype=torch.int64)
    mask[0, 0] = 0
    runtime = TorchRuntime(model)
    expected, _ = runtime.decode(
        embeds.detach().numpy(), mask.numpy(), np.arange(1, 10)[None], model.empty_slot(1)
    )
    options = {"threads": 1, "prompt_tokens": 4, "file": str(checkpoint), "preset_name": None}
    exact = TorchPeer(**options, dtype="float32", compiled=False).logits(tokens).numpy()
    assert np.array_equal(exact, expected)
    half = TorchPeer(**options, dtype="bfloat16", compiled=False).logits(tokens).float().numpy()
    assert 0 < np.abs(half - expected).max() < 0.05 * np.abs(expected).max()


def test_the_torch_peer_refuses_a_packed_checkpoint(ternary_model, tmp_path):
    lower(ternary_model, WeightFormat()).save_pretrained(tmp_path / "packed")
    options = {"threads": 1, "prompt_tokens": 4, "preset_name": None, "dtype": "float32", "compiled": False}
    with pytest.raises(UserError, match="has no float32 decoder"):
        TorchPeer(file=str(tmp_path / "packed"), **options)


def test_a_package_that_is_not_installed_is_one_sentence():
    nothing = Contender("nothing", "torch", "-", "-", {}, missing="the package nothing is not installed.")
    (run,) = take_turns([nothing], PeerPlan((1,), 2, 2))
    assert (run.status, run.reason) == ("skipped", "the package nothing is not installed.")
    for adapter, package, imported in (
        ("genai", "onnxruntime-genai", "onnxruntime_genai"),
        ("llama.cpp", "xllamacpp", "xllamacpp"),
    ):
        if importlib.util.find_spec(imported) is None:
            request = {"do": "load", "adapter": adapter, "threads": 1, "prompt_tokens": 4, "options": {}}
            with pytest.raises(UserError, match=f"^{package} is not installed: pip install {package}.$"):
                PeerWorker().answer(request)


@pytest.mark.linux
def test_a_program_that_takes_too_long_is_ended_and_the_others_go_on(tiny_bundle, monkeypatch):
    monkeypatch.setattr(peer_turns, "LOAD_LIMIT_S", 0.05)
    contenders, _, _ = contender_list.given_contenders([str(tiny_bundle)], [], None, False, print)
    (run,) = take_turns(contenders, PeerPlan((1,), 2, 2))
    assert (run.status, run.reason) == ("failed", "it took longer than 0.05 s and was ended")


def test_rows_of_one_name_are_told_apart_by_their_files():
    made = [Contender(name, "bundle", "", file, {}) for name, file in (("a", "x"), ("a", "y"), ("b", "x"))]
    assert [each.name for each in contender_list._distinct(made)] == ["a, x", "a, y", "b"]


def test_ratios_are_of_one_number_of_threads_and_say_who_is_faster():
    def made(name: str, threads: int, ms: float, ours: bool = False) -> PeerRun:
        times = {phase: [ms, ms, ms] for phase in ("prefill", "decode")}
        contender = Contender(name, "bundle", "", "", {}, is_ours=ours)
        return PeerRun(contender, threads, milliseconds=times)

    table = peers_bench.ratios([made("a", 1, 2.0, True), made("b", 1, 8.0), made("b", 2, 1.0)])
    assert [(row["name"], row["threads"], row["phase"], row["value"]) for row in table] == [
        ("b", 1, "prefill", 0.25),
        ("b", 1, "decode", 0.25),
    ]


def test_a_random_gguf_has_the_shape_and_the_types_that_llama_cpp_would_choose(tmp_path):
    pytest.importorskip("gguf")
    config = tiny_config(text=_text(hidden_size=64, intermediate_size=256, sub_norm=False))
    write_random_gguf(tmp_path / "tiny.gguf", config.text, "TQ2_0")
    header = read_gguf_header(tmp_path / "tiny.gguf")
    assert header.metadata["general.architecture"] == "qwen2", "it has biases"
    assert header.tensors["blk.0.ffn_down.weight"].type.name == "TQ2_0"
    assert header.tensors["blk.0.ffn_up.weight"].type.name == "Q4_0", "rows of 64 are no block of 256"
    assert header.tensors["token_embd.weight"].shape == (300, 64)
    whole = contender_list.gguf_bytes_per_token(header)
    assert whole == sum(tensor.nbytes for tensor in header.tensors.values()), "the table is the head too"


def _text(**changes):
    return dataclasses.replace(tiny_config().text, **changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{bundle}", "--threads", "0"], "--threads is 0; give 1 or more"),
        (["{bundle}", "--threads", "one"], "--threads one is not a list of numbers"),
        (["{bundle}", "--rounds", "1"], "--rounds is 1; give 2 or more"),
        (["{bundle}", "--new-tokens", "500"], "--new-tokens is 500; give 190 or less"),
        (["{bundle}", "{bundle}"], "tiny is given twice: give every bundle and every file once."),
        (["{bundle}", "--gguf", "none.gguf"], "none.gguf does not exist"),
        (["no-bundle"], "no-bundle"),
        (["--gguf", "Q4_0"], "stand beside a bundle"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, tiny_bundle):
    given = [word.format(bundle=tiny_bundle) for word in arguments]
    result = CliRunner().invoke(command, ["peers", *given])
    assert isinstance(result.exception, UserError), result.output
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)
