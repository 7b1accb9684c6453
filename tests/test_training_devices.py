"""Training in several processes: real gloo processes that `accelerate launch` starts, compared with one process."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from captioned_pictures import mixed_data
from conftest import FLOAT, seeded_model, tiny_config
from safetensors.torch import load_file

from microvlm import MicroVLM
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.training.batches.caption_batches import CaptionBatch
from microvlm.training.caption_options import NEW_PARTS, CaptionOptions, TeacherOptions
from microvlm.training.loop.processes import Processes, check_processes
from microvlm.training.loop.run_summary import peak_rss_bytes
from microvlm.training.loop.sharding import check_sharding
from microvlm.training.loop.stage_trainer import step_generator
from microvlm.training.loop.step_metrics import StepMemory
from microvlm.training.recipe import Recipe, StageConfig, load_recipe
from microvlm.training.stages.captions import CaptionTask
from microvlm.training.stages.registry import task_class
from microvlm.training.stages.task import DataFolder, StageInputs
from microvlm.training.trainer import TrainingRun, open_data, train

NEW = dict.fromkeys(NEW_PARTS, 1.0)
DISTIL = StageConfig(
    "distil",
    "captions",
    2,
    8,
    2e-5,
    decoder_bits=1.58,
    caption=CaptionOptions(trained=NEW | {"decoder": 0.5}, teacher=TeacherOptions()),
)
"""A low rate: AdamW's first steps have the size of the rate even where a gradient is nothing but rounding errors, as of
biases of keys, and rounded weights and activations jump."""
MEMORY = StageConfig(
    "memory",
    "captions",
    2,
    8,
    1e-3,
    caption=CaptionOptions(trained=NEW | {"decoder.layers.last1": 0.1}, episode_share=0.2),
)
"""Few episodes: in some batches a process has none of its own."""
RECIPE = Recipe(
    "devices", None, 3, (DISTIL, MEMORY), mixed_precision="no", log_every=1, save_every=2, evaluate_every=100
)
DDP = {"distributed_type": "MULTI_GPU"}
"""Accelerate's name for DDP on CPUs too, where use_cpu is true."""
FSDP = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
    },
}
COMMAND = "from microvlm.training.train_command import main\nmain()\n"
UNMEASURED = ("train/step_s", "train/samples_per_second", "train/tokens_per_second")

pytestmark = [pytest.mark.posix, pytest.mark.training]


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_processor) -> Path:
    """A folder with mixed data, a float start, a recipe and Accelerate's files of two processes."""
    folder = tmp_path_factory.mktemp("devices")
    mixed_data(folder / "pictures")
    config = tiny_config(FLOAT)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, sub_norm=False))
    seeded_model(config).save_pretrained(folder / "start")
    Processor(tiny_processor.tokenizer, config).save(folder / "start")
    (folder / "recipe.json").write_bytes(msgspec.json.encode(RECIPE))
    (folder / "command.py").write_text(COMMAND)
    for name, settings in (("ddp", DDP), ("fsdp", FSDP)):
        common = {"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "num_machines": 1}
        document = {**common, "use_cpu": True, **settings}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(document))
    return folder


def launch(work: Path, settings: str, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run microvlm-train in two processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{settings}.yaml"]
    command = ["--main_process_port", "0", "command.py", "recipe.json", "--data", "mixed-data"]
    return subprocess.run(
        [*launcher, *command, "--start", "start", "-o", str(out), *options],
        cwd=work,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )


def opened(work: Path):
    return open_data(RECIPE, [DataFolder(work / "mixed-data")])


@pytest.fixture(scope="module")
def one(work) -> Path:
    """The run of one process."""
    out = work / "one"
    assert train(RECIPE, opened(work), out, lambda _: None, start=str(work / "start"))
    return out


@pytest.fixture(scope="module")
def sharded(work) -> Path:
    """The run of two processes with FSDP2."""
    result = launch(work, "fsdp", work / "fsdp")
    assert result.returncode == 0, result.stderr
    return work / "fsdp"


def rows(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name.startswith("train/") and name not in UNMEASURED}
        for row in lines
        if "train/loss" in row
    ]


def assert_same_training(run: Path, reference: Path) -> None:
    """Every step has the losses of the reference within 1e-5, and the same tensors are stored."""
    expected, found = rows(reference), rows(run)
    assert len(found) == len(expected) == 4
    for row, other in zip(found, expected, strict=True):
        assert set(row) == set(other)
        for name, value in other.items():
            # The files keep six decimals. Norms square the gradients' rounding errors.
            relative = 1e-4 if name == "train/gradient_norm" else 1e-5
            assert row[name] == pytest.approx(value, rel=relative, abs=1.5e-6), name
    for stage in RECIPE.stages:
        expected_weights = load_file(reference / stage.name / "weights.safetensors")
        assert set(load_file(run / stage.name / "weights.safetensors")) == set(expected_weights)


def test_two_processes_with_ddp_have_the_losses_of_one(work, one):
    out = work / "ddp"
    result = launch(work, "ddp", out)
    assert result.returncode == 0, result.stderr
    assert_same_training(out, one)
    assert result.stderr.count("checkpoint written to") == 1
    assert result.stdout.count("trained. Next:") == 1


def test_two_processes_with_fsdp_have_the_losses_of_one_and_write_an_ordinary_checkpoint(sharded, one):
    assert_same_training(sharded, one)
    answer = MicroVLM.from_pretrained(sharded / "checkpoint").generate(np.zeros((40, 40, 3), np.uint8))
    assert isinstance(answer, str)

    def files(run: Path) -> set[Path]:
        return {path.relative_to(run) for path in run.rglob("*")}

    assert files(sharded) == files(one)


def test_a_sharded_run_that_is_stopped_equals_an_unbroken_one_and_goes_on_in_one_process(work, one, sharded):
    out = work / "broken"
    result = launch(work, "fsdp", out, "--stop-after", "1")
    assert result.returncode == 0, result.stderr
    assert not (out / "checkpoint").exists()
    shutil.copytree(out, work / "further")
    result = launch(work, "fsdp", out)
    assert result.returncode == 0, result.stderr
    assert rows(out) == rows(sharded)
    unbroken = load_file(sharded / "checkpoint" / "model.safetensors")
    for name, tensor in load_file(out / "checkpoint" / "model.safetensors").items():
        assert torch.equal(tensor, unbroken[name]), name
    assert train(RECIPE, opened(work), work / "further", lambda _: None, start=str(work / "start"))
    assert_same_training(work / "further", one)


def test_a_batch_that_two_processes_cannot_share_is_one_sentence(work):
    result = launch(work, "ddp", work / "odd", "--batch-size", "7")
    assert result.returncode != 0
    assert result.stderr.count("2 processes cannot share a batch of 7 samples equally") == 1
    assert not (work / "odd").exists()


def test_a_score_that_is_to_be_reached_is_refused_in_one_sentence(work):
    result = launch(work, "ddp", work / "until", "--until", "loss=2.5")
    assert result.returncode != 0
    assert result.stderr.count("--until measures a run of one process") == 1
    assert not (work / "until").exists()


def test_tasks_that_share_no_batches_and_what_fsdp_cannot_train_are_refused():
    emoji = StageConfig("words", "vlm", 2, 8, 1e-3)
    with pytest.raises(UserError, match=r"^stage 'words' trains in one process, because its task 'vlm'"):
        check_processes(Processes(2, 1), [emoji], [False])
    check_processes(Processes(), [emoji], [False])
    texts = load_recipe("distill-texts").stages
    shared = [task_class(stage.task, stage.name).shares_batches for stage in texts]
    with pytest.raises(UserError, match=r"trains in one process, because its task 'texts'"):
        check_processes(Processes(2, 1), texts, shared)
    muon = msgspec.structs.replace(MEMORY, muon_factor=2.0)
    with pytest.raises(UserError, match=r"^stage 'memory' uses Muon, which needs whole matrices"):
        check_sharding(Processes(2, 0, shards=True), [muon], 32)
    with pytest.raises(UserError, match=r"^--base-bits 4 and FSDP do not go together"):
        check_sharding(Processes(2, 0, shards=True), [MEMORY], 4)
    check_sharding(Processes(2, 0), [muon], 4)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "training with DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
    ],
)
def test_a_launch_that_cannot_train_is_refused(monkeypatch, variables, sentence):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        Processes.join()


def test_the_peak_of_a_process_outlives_the_measuring_of_a_step():
    memory = StepMemory(torch.device("cpu"))
    ballast = np.ones(10**8, np.uint8)
    before = peak_rss_bytes()
    del ballast
    with memory.step():
        pass
    assert peak_rss_bytes() >= before


def share_of(run: TrainingRun, process: int, count: int, step: int) -> CaptionBatch:
    inputs = StageInputs(
        run.config(1), run.task(1).rows, RECIPE, MEMORY, run.data, processes=Processes(count, process)
    )
    return CaptionTask(inputs).draw_step(step, step_generator(3, 1, step))


def test_the_shares_of_three_processes_are_together_the_batch_of_one(work):
    run = TrainingRun(RECIPE, opened(work), Path("unused"), lambda _: None, start=str(work / "start"))
    for step in range(3):
        whole = share_of(run, 0, 1, step)
        shares = [share_of(run, process, 3, step) for process in range(3)]
        for part in ("ids", "mask", "labels"):
            together = torch.cat([getattr(share.rows, part) for share in shares])
            assert torch.equal(together, getattr(whole.rows, part))
        assert whole.episodes is not None
        places = whole.share.caption_places()
        assert places.tolist() == list(range(len(places)))
        captions = torch.cat([share.captions.ids for share in shares])[shares[0].share.caption_places()]
        assert torch.equal(captions, whole.captions.ids)
        pictures = torch.cat([share.pixels[share.captioned] for share in shares])
        assert torch.equal(pictures[shares[0].share.caption_places()], whole.pixels[whole.captioned])
        answers = torch.cat([share.episodes.answers.ids for share in shares])
        assert torch.equal(answers, whole.episodes.answers.ids)
        assert sum(len(share.pixels) for share in shares) == len(whole.pixels)
        seen = [
            share.episodes.written[number].tolist() if number >= 0 else int(number)
            for share in shares
            for number in share.visible_memory
        ]
        expected = [
            whole.episodes.written[number].tolist() if number >= 0 else int(number)
            for number in whole.visible_memory
        ]
        assert seen == expected
