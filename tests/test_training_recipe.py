"""Recipes from files: every changed one is a recipe or one sentence, and nothing is written for one that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from document_mutations import check_mutations

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.training.emoji.data.emoji import load_emoji
from microvlm.training.loop.run_state import STATE, load_state, save_state
from microvlm.training.recipe import Recipe, StageConfig, load_recipe
from microvlm.training.stages.registry import TASKS, task_class
from microvlm.training.trainer import train

NANO = Path(__file__).parent.parent / "training" / "recipes" / "nano.json"
VLM = StageConfig("ground", "vlm", 1, 10, 1e-3, mixture={"caption": 0.5, "episode": 0.2})


def test_every_changed_recipe_is_a_recipe_or_one_sentence(tmp_path):
    path = tmp_path / "recipe.json"

    def read(content):
        path.write_bytes(content)
        recipe = load_recipe(str(path))
        names = [stage.name for stage in recipe.stages]
        assert all(Path(name).name == name and "\\" not in name for name in names)
        assert len({name.casefold() for name in names}) == len(names)
        for stage in recipe.stages:
            if stage.task in TASKS:
                task_class(stage.task, stage.name).check(stage)

    document = json.loads(NANO.read_text())
    others = ("photo.json", "photo-further.json", "distill-texts.json")
    recipes = [document, *(json.loads(NANO.with_name(name).read_text()) for name in others)]
    stages = [stage for recipe in recipes for stage in recipe["stages"]]
    # Recipes may give two tasks one name.
    by_task = {stage["task"]: {**stage, "name": stage["task"], "rotation": 0} for stage in stages}
    assert set(by_task) | {"captions"} == set(TASKS)
    document["stages"] = list(by_task.values())
    assert check_mutations(document, read, least_refused=0.8) > 500


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        ".",
        "a/b",
        "a\\b",
        "",
        "/etc",
        "checkpoint",
        "Checkpoint",
        "recipe.json",
        "a.",
        "x" * 70,
        "\n",
    ],
)
def test_a_stage_is_named_as_one_folder(name):
    document = json.loads(NANO.read_text())
    document["stages"][3]["name"] = name
    with pytest.raises(UserError, match=r"stages\[3\]"):
        parse_recipe(document)
    with pytest.raises(UserError, match="name"):
        StageConfig(name, "vlm", 1, 1, 1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stages": [VLM, VLM]}, "two stages have one name"),
        ({"stages": [VLM, {"name": "GROUND"}]}, "two stages have one name"),
        ({"stages": []}, "'stages' must be a list of length >= 1"),
        ({"preset": "pico"}, "unknown preset 'pico'; use one of nano, photo, small, full"),
        ({"vendor_weights": {"notto": 1.0}}, "unknown vendor 'notto'; use noto, "),
        ({"seed": -1}, "'seed' must be a whole number >= 0"),
        ({"stages": [{"scene_kinds": {"what": 1.0}}]}, "must have a share for each of what, where"),
        (
            {"stages": [{"scene_kinds": dict.fromkeys(("what", "where", "how many", "which colour"), 0.3)}]},
            "sum to 1",
        ),
        ({"stages": [{"decoder_bits": 2}]}, "decoder_bits must be 32 or 1.58"),
        ({"stages": [{"label_smoothing": 1.0}]}, "label_smoothing' must be a number < 1"),
        ({"stages": [{"stepz": 1}]}, r"'stages\[0\]\.stepz' is not known to this version"),
    ],
)
def test_relations_of_a_recipe_are_checked(change, sentence):
    base = msgspec.to_builtins(VLM)
    stages = [base | msgspec.to_builtins(stage) for stage in change.get("stages", [VLM])]
    document = {"name": "r", "preset": "nano", "seed": 0, **change, "stages": stages}
    with pytest.raises(UserError, match=sentence):
        parse_recipe(document)


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        (msgspec.structs.replace(VLM, mixture={"caption": 1.0}), "a vlm stage needs both kinds"),
        (
            msgspec.structs.replace(VLM, mixture={"episodes": 1.0}),
            "names 'episodes'; for a vlm stage it may name",
        ),
        (
            msgspec.structs.replace(VLM, fresh=["nose"]),
            "no part 'nose' to begin anew; it has memory_prior, vision,",
        ),
        (StageConfig("r", "recall", 1, 20, 1e-3, mixture={"fact": 1e-3}), "no facts to recall"),
        (StageConfig("s", "scope", 1, 20, 1e-3, mixture={"fact": 1}), "may name no kinds at all"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused_before_the_folder_is_claimed(
    stage, sentence, drawn_build, tmp_path
):
    recipe = Recipe("r", "nano", 0, (msgspec.structs.replace(VLM, name="first"), stage), mixed_precision="no")
    with pytest.raises(UserError, match=sentence):
        train(recipe, load_emoji(drawn_build[0]), tmp_path / "run", print)
    assert not (tmp_path / "run").exists()


def test_a_damaged_record_of_a_run_is_one_sentence(tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert load_state(tmp_path, module, [optimizer], [scheduler]) is None
    save_state(tmp_path, 20, module, [optimizer], (), {"loss": 1.0}, keep=1)
    (path,) = tmp_path.rglob(STATE)
    document = json.loads(path.read_text())
    assert load_state(tmp_path, module, [optimizer], [scheduler]).step == 20

    def read(content):
        path.write_bytes(content)
        assert isinstance(load_state(tmp_path, module, [optimizer], [scheduler]).step, int)

    assert check_mutations(document, read) > 50


def parse_recipe(document):
    """The recipe as `load_recipe` reads it."""
    return documents.parse(json.dumps(document), Recipe, "it", "mend it")
