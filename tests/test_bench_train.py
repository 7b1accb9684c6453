"""`microvlm-bench train`: variants of a training step in turns, their phases, bytes and operations."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from microvlm.bench.bench_command import command
from microvlm.bench.report import parse_report
from microvlm.bench.training.step_bench import (
    VariantRun,
    _Loaded,
    _Memory,
    _Step,
    bars,
    peak_of,
    ratios,
    result,
)
from microvlm.errors import UserError
from microvlm.training.step_costs.generated_captions import GeneratedCaptions
from microvlm.training.step_costs.step_worker import StepWorker
from microvlm.training.step_costs.variant_task import build

LOAD = {
    "do": "load", "model": "nano", "data": None, "tokens": 100, "batch_size": 4, "device": "cpu", "threads": 1,
    "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def workers():
    made = {}
    for variant in ("fp32", "qat"):
        made[variant] = StepWorker()
        made[variant].answer({**LOAD, "variant": variant})
    return made


@pytest.mark.training
def test_a_step_has_all_phases_and_every_variant_trains_on_the_same_batch(workers):
    steps = {name: worker.answer({"do": "step", "index": 0}) for name, worker in workers.items()}
    for step in steps.values():
        assert set(step["ms"]) == {"data", "vision", "forward", "backward", "step"}
        assert all(value > 0 for value in step["ms"].values())
    counts = [
        {name: step[name] for name in ("images", "samples", "tokens", "answer_tokens")}
        for step in steps.values()
    ]
    assert counts[0] == counts[1]
    assert counts[0]["samples"] == 4


@pytest.mark.training
def test_memory_and_operations_are_those_of_the_tensors(workers):
    figures = {name: worker.answer({"do": "memory", "index": 5}) for name, worker in workers.items()}
    for name, worker in workers.items():
        module = worker._measured.trainer.module
        learning = [p for p in module.parameters() if p.requires_grad]
        assert figures[name]["gradients_bytes"] <= sum(p.nbytes for p in learning)
        # Adam's two moments of what has had a gradient, and a number a tensor.
        assert figures[name]["optimizer_bytes"] >= 2 * figures[name]["gradients_bytes"]
        assert figures[name]["weights_bytes"] >= sum(p.nbytes for p in module.parameters())
        assert figures[name]["activations_bytes"] > 1_000_000
    # The same products, whatever the integers' type.
    assert figures["qat"]["flops"] == figures["fp32"]["flops"] > 1e8


@pytest.mark.training
def test_a_batch_has_at_least_the_tokens_that_were_asked_for():
    worker = StepWorker()
    worker.answer({**LOAD, "variant": "fp32", "batch_size": None, "tokens": 300})
    assert worker.answer({"do": "step", "index": 0})["tokens"] >= 300


@pytest.mark.training
def test_the_command_writes_a_report_that_renders(tmp_path):
    out = tmp_path / "train.json"
    arguments = [
        "train",
        "nano",
        "--variant",
        "fp32",
        "--variant",
        "qat",
        "--batch-size",
        "3",
        "--repeats",
        "2",
    ]
    outcome = CliRunner().invoke(
        command, [*arguments, "--threads", "1", "--json", "-o", str(out)], standalone_mode=False
    )
    assert outcome.exception is None, outcome.exception
    document = json.loads(outcome.stdout)
    assert [entry["status"] for entry in document["variants"]] == ["ok", "ok"]
    assert {row["clock"] for row in document["ratios"]} == {"wall", "cpu"}
    # So small a step is not what the demand is about.
    assert [bar["met"] for bar in document["bars"]] == [None, None]
    text = parse_report(out.read_bytes(), "train.json").markdown()
    assert "activations kept for the backward pass" in text
    assert "MFU" in text


def test_a_device_that_is_not_here_and_one_that_is_none_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="no such GPU"):
        build("fp32", "nano", None, 64, 2, "cuda", 0)
    outcome = CliRunner().invoke(command, ["train", "nano", "--device", "tpu"], standalone_mode=False)
    assert "give cpu, cuda or cuda:N" in str(outcome.exception)


def drawn_run(name: str, milliseconds: float) -> VariantRun:
    ms = {"data": 0.0, "vision": 0.0, "forward": milliseconds, "backward": 0.0, "step": 0.0}
    run = VariantRun(name, loaded=_Loaded(8, 10, 10, 1))
    run.steps = [_Step({**ms, "data": float(n)}, milliseconds, 8, 8, 600, 100, 1.0) for n in range(4)]
    run.peaks, run.memory = [1e9, 2e9], _Memory(40, 40, 80, 100, 1000, 1_000_000, 300)
    return run


def test_throughput_mfu_and_the_demand_are_sums_of_the_timings():
    runs = [drawn_run("fp32", 100.0), drawn_run("qat", 200.0), drawn_run("bf16", 50.0)]
    # The precision of both is float32; bfloat16 has a peak of its own.
    runs[0].peaks, runs[2].peaks = [1e9], [9e9]
    entry = result(runs[0], peak_of(runs[0], runs))
    seconds = 0.1015
    assert entry["tokens_per_s"] == pytest.approx(600 / seconds, rel=1e-4)
    # Operations were counted in a step of 300 tokens.
    assert entry["mfu"] == pytest.approx(2_000_000 / seconds / 2e9, abs=1e-4)
    table = {row["clock"]: row for row in ratios(runs) if row["variant"] == "qat"}
    assert table["cpu"]["value"] == 0.5
    assert [bar["met"] for bar in bars(ratios(runs), 600)] == [False, False]
    assert [bar["met"] for bar in bars(ratios(runs), 100)] == [None, None]


def test_drawn_pictures_are_a_function_of_their_number():
    first, second = GeneratedCaptions(), GeneratedCaptions()
    assert first.sample("train", 7) == second.sample("train", 7) != first.sample("train", 8)
    assert list(first.texts("train"))[7] == first.sample("train", 7).turns[0].answer
