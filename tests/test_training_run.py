"""The trainer: a resumed run ends where an unbroken one does, and a run can start from a stored checkpoint."""

import dataclasses
import json
import shutil

import msgspec
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("resvg_py")

from microvlm import MicroVLM
from microvlm.errors import UserError
from microvlm.presets import _PRESETS, preset
from microvlm.training.emoji.data.emoji import load_emoji
from microvlm.training.emoji.stages.scope import ScopeTask
from microvlm.training.loop.run_state import state_folders
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.trainer import train
from microvlm.training.warm_start import float_weights, start_from, weights_sha256

MIXTURE = {"caption": 0.4, "scene": 0.4, "episode": 0.2, "crowd": 0.2}
FLOAT_STAGE = StageConfig(
    "ground",
    "vlm",
    3,
    10,
    1e-3,
    vision_learning_rate=1e-4,
    muon_factor=2.0,
    mixture=MIXTURE,
    naming_weight=0.3,
    guidance_weight=0.3,
)
TERNARY_STAGE = StageConfig("ternary", "vlm", 2, 10, 1e-3, decoder_bits=1.58, mixture=MIXTURE | {"fact": 0.8})
RECALL_STAGE = StageConfig(
    "recall", "recall", 2, 20, 1e-3, decoder_bits=1.58, mixture={"fact": 0.8, "episode": 0.2}
)
SCOPE_STAGE = StageConfig("scope", "scope", 2, 1, 1e-3, decoder_bits=1.58)
STAGES = (FLOAT_STAGE, TERNARY_STAGE, RECALL_STAGE, SCOPE_STAGE)
RECIPE = Recipe("tiny", "nano", 0, STAGES, mixed_precision="no", log_every=1)


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def emoji(drawn_build):
    return load_emoji(drawn_build[0])


@pytest.fixture(scope="module", autouse=True)
def _alike():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microvlm.training.emoji.stages.recall.ALIKE_SHARE", 1.0)
        yield


@pytest.fixture(scope="module")
def finished(emoji, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert train(RECIPE, emoji, out, silent)
    return out


def tensors(checkpoint):
    return MicroVLM.from_pretrained(checkpoint).state_dict()


def logged(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


def metrics(row):
    return {name.removeprefix("train/") for name in row}


@pytest.mark.training
def test_a_run_logs_every_loss_and_ships_packed_weights(finished):
    rows = logged(finished)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["train/stage_step"] for row in rows] == [1, 2, 3, 1, 2, 1, 2, 1, 2]
    assert {"answers", "episodes", "scope", "named", "guided", "shown"} <= metrics(rows[0])
    assert {"facts", "keys", "matched", "found", "spread", "gate", "nearest"} <= metrics(rows[4])
    assert "decoder.layers.0.mlp.up_proj.packed" in tensors(finished / "checkpoint")
    document = json.loads((finished / "checkpoint" / "training.json").read_text())
    assert document["recipe"]["name"] == "tiny"
    (ground,) = document["runs"]["ground"]
    assert (ground["from_step"], ground["precision"], len(ground["code_sha256"])) == (0, "no", 64)
    assert ground["optimizers"][0] == "AdamW"


@pytest.mark.training
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(finished, emoji, tmp_path):
    """Batches of stage `recall` are of objects that look alike, which a resumed run ranks anew."""
    out = tmp_path / "run"
    calls, lines = 0, []
    while not train(RECIPE, emoji, out, lines.append, stop_after=1):
        calls += 1
    assert calls == 5
    assert [line for line in lines if line.startswith("ground: ")] == [
        "ground: 3 steps",
        "ground: 3 steps, of which 1 are done",
        "ground: 3 steps, of which 2 are done",
    ]
    steps = json.loads((out / "checkpoint" / "training.json").read_text())["runs"]["ground"]
    assert [run["from_step"] for run in steps] == [0, 1, 2]
    # The newest states, of which a crash while saving leaves the older one intact.
    assert [path.name for path in state_folders(out / "ground")] == ["00000002", "00000003"]
    assert {path.suffix for path in (out / "ground").rglob("*") if path.is_file()} == {
        ".safetensors",
        ".json",
        ".jsonl",
        "",
    }
    unbroken = tensors(finished / "checkpoint")
    for name, tensor in tensors(out / "checkpoint").items():
        assert torch.equal(tensor, unbroken[name]), name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.training
def test_batches_drawn_by_workers_train_the_same_weights(finished, emoji, tmp_path):
    recipe = msgspec.structs.replace(RECIPE, stages=(FLOAT_STAGE, TERNARY_STAGE))
    assert train(recipe, emoji, tmp_path / "run", silent, workers=2)
    for stage in ("ground", "ternary"):
        with_workers, without = (
            load_file(out / stage / "weights.safetensors") for out in (tmp_path / "run", finished)
        )
        assert all(torch.equal(with_workers[name], without[name]) for name in without)


@pytest.mark.training
def test_a_stage_can_have_a_precision_of_its_own(finished, emoji, tmp_path, monkeypatch):
    """Uses `scope` stages, which compute in float32 either way, so that no CPU emulates bfloat16."""
    autocast = []
    loss = ScopeTask.loss
    monkeypatch.setattr(
        "microvlm.training.loop.training_loop.usable_precision", lambda precision, _: precision
    )
    monkeypatch.setattr(
        ScopeTask, "loss", lambda *args: autocast.append(torch.is_autocast_enabled("cpu")) or loss(*args)
    )
    first, second, last = (
        msgspec.structs.replace(SCOPE_STAGE, name=name, steps=1) for name in ("a", "b", "c")
    )
    stages = (RECALL_STAGE, first, msgspec.structs.replace(second, mixed_precision="bf16"), last)
    out = tmp_path / "run"
    shutil.copytree(finished / "recall", out / "recall")
    assert train(msgspec.structs.replace(RECIPE, stages=stages), emoji, out, silent)
    assert autocast == [False, True, False]
    runs = json.loads((out / "checkpoint" / "training.json").read_text())["runs"]
    assert [runs[name][0]["precision"] for name in "abc"] == ["no", "bf16", "no"]


def test_an_unknown_precision_is_refused():
    for broken in (
        lambda: msgspec.structs.replace(RECIPE, mixed_precision="half"),
        lambda: msgspec.structs.replace(SCOPE_STAGE, mixed_precision="half"),
    ):
        with pytest.raises(UserError, match="mixed_precision 'half'; use one of no, bf16"):
            broken()


@pytest.mark.training
def test_the_scope_stage_trains_the_detector_and_nothing_else(finished):
    before, after = (load_file(finished / stage / "weights.safetensors") for stage in ("recall", "scope"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"scope.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")}


@pytest.mark.training
def test_the_recall_stage_trains_encoder_and_readout_and_nothing_that_a_masked_model_uses(finished):
    before, after = (load_file(finished / stage / "weights.safetensors") for stage in ("ternary", "recall"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"memory_encoder", "memory_projection"}
    assert {"memory_projection.readout.fc1.weight", "memory_projection.linear.weight"} < changed
    last = metrics(logged(finished)[6])
    assert {"facts", "keys", "matched", "found", "episodes"} <= last
    assert "gate" not in last


@pytest.mark.training
def test_a_stage_can_begin_a_part_anew(finished, emoji, tmp_path):
    def first_weights(fresh: list[str]) -> dict:
        out = tmp_path / ("fresh" if fresh else "kept")
        shutil.copytree(finished / "ground", out / "ground")
        stages = (
            FLOAT_STAGE,
            msgspec.structs.replace(TERNARY_STAGE, fresh=fresh, steps=1, learning_rate=1e-9),
        )
        train(msgspec.structs.replace(RECIPE, stages=stages), emoji, out, silent)
        return load_file(out / "ternary" / "weights.safetensors")

    before = load_file(finished / "ground" / "weights.safetensors")
    trained_weights, fresh_weights = first_weights([]), first_weights(["scope"])
    name = "scope.fc1.weight"
    assert torch.allclose(trained_weights[name], before[name], atol=1e-6)
    assert not torch.allclose(fresh_weights[name], before[name], atol=1e-3)
    name = "adapter.output.weight" if "adapter.output.weight" in before else next(iter(before))
    assert torch.allclose(fresh_weights[name], before[name], atol=1e-6)


@pytest.mark.training
def test_a_run_starts_from_the_weights_that_a_checkpoint_computes_with(finished, emoji, tmp_path):
    checkpoint, out = str(finished / "checkpoint"), tmp_path / "run"
    lines: list[str] = []
    assert train(RECIPE, emoji, out, lines.append, start=checkpoint, start_stage="ternary")
    assert not (out / "ground").exists()
    assert f"starting from {checkpoint}" in lines
    run = json.loads((out / "checkpoint" / "training.json").read_text())
    assert run["start"] == {"weights_sha256": weights_sha256(checkpoint), "stage": "ternary"}
    # Vision is frozen in this stage, so its bytes stay the same.
    before, after = tensors(checkpoint), tensors(out / "checkpoint")
    name = "vision.layers.0.mlp.fc1.packed"
    name = (
        name
        if name in before
        else next(key for key in before if key.startswith("vision.") and "packed" in key)
    )
    assert torch.equal(before[name], after[name])


@pytest.mark.training
def test_float_weights_are_the_integers_times_their_scale(finished):
    model = MicroVLM.from_pretrained(finished / "checkpoint")
    wide = float_weights(str(finished / "checkpoint"))
    layer = model.get_submodule("decoder.layers.1.mlp.down_proj")
    assert torch.equal(wide["decoder.layers.1.mlp.down_proj.weight"], layer.unpack() * layer.scale)
    table = model.embedding.table
    assert torch.equal(wide["embedding.weight"], table.unpack() * table.scale[:, None])


@pytest.mark.parametrize(
    ("start", "stage", "words"),
    [
        ("nano", None, "go together"),
        (None, "ternary", "go together"),
        ("nano", "polish", "no stage 'polish'"),
        ("nowhere", "ternary", "there is no model 'nowhere'"),
    ],
)
def test_a_start_that_makes_no_sense_is_one_sentence(emoji, tmp_path, start, stage, words):
    with pytest.raises(UserError, match=words):
        train(RECIPE, emoji, tmp_path / "run", silent, start=start, start_stage=stage)
    assert not (tmp_path / "run").exists()


def test_another_models_checkpoint_is_refused(emoji, tmp_path, tiny_checkpoint):
    with pytest.raises(UserError, match="another model's checkpoint"):
        train(RECIPE, emoji, tmp_path / "run", silent, start=str(tiny_checkpoint), start_stage="ternary")
    assert not (tmp_path / "run").exists()


@pytest.mark.training
def test_a_folder_of_another_start_is_refused(finished, emoji, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with pytest.raises(UserError, match="holds another run"):
        train(RECIPE, emoji, out, silent, start=str(finished / "checkpoint"), start_stage="ternary")


@pytest.mark.training
def test_a_folder_of_another_model_under_the_same_presets_name_is_refused(
    finished, emoji, tmp_path, monkeypatch
):
    """The weights have the same shapes, so nothing else would notice."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    nano = preset("nano")
    changed = dataclasses.replace(nano, text=dataclasses.replace(nano.text, rope_theta=5e5))
    monkeypatch.setitem(_PRESETS, "nano", changed)
    with pytest.raises(UserError, match="holds another run"):
        train(RECIPE, emoji, out, silent)
    begun = json.loads((out / "recipe.json").read_text())
    assert begun.pop("preset") == json.loads(json.dumps(nano.to_dict()))
    monkeypatch.setitem(_PRESETS, "nano", nano)
    # A folder of an older version, which does not record its preset, resumes.
    (out / "recipe.json").write_text(json.dumps(begun))
    assert train(RECIPE, emoji, out, silent)


@pytest.mark.training
def test_a_part_of_a_checkpoint_can_begin_anew(finished, emoji, tmp_path):
    checkpoint, out = str(finished / "checkpoint"), tmp_path / "run"
    lines: list[str] = []
    train(RECIPE, emoji, out, lines.append, start=checkpoint, start_stage="ternary", fresh=["scope"])
    assert any("not from it: scope.fc1.bias" in line for line in lines)
    begun = json.loads((out / "recipe.json").read_text())["start"]
    assert begun["fresh"] == ["scope"]
    with pytest.raises(UserError, match="no part 'nose'"):
        start_from(MicroVLM.from_pretrained(checkpoint), checkpoint, ["nose"])
