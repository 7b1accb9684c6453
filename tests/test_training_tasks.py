"""Every stage's task: a batch is a function of the step's generator alone, and the loss draws no random numbers."""

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py")

from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.presets import preset
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.data.emoji import EmojiData, load_emoji
from microvlm.training.emoji.stages import distill
from microvlm.training.emoji.stages.vlm import VLMTask
from microvlm.training.emoji.teacher import TEACHER_WIDTH
from microvlm.training.emoji.tokenizer_corpus import tokenizer_corpus
from microvlm.training.loop.stage_trainer import step_generator
from microvlm.training.recipe import Recipe, StageConfig
from microvlm.training.stages.registry import TASKS, task_class
from microvlm.training.stages.task import StageInputs, Task
from microvlm.training.tokenizer_training import train_tokenizer
from microvlm.training.trainer import stage_config, train

STAGES = {
    "distill": StageConfig("distill", "distill", 2, 4, 1e-3),
    "vlm": StageConfig(
        "vlm",
        "vlm",
        2,
        10,
        1e-3,
        vision_learning_rate=1e-4,
        mixture={"caption": 0.4, "scene": 0.4, "episode": 0.2, "crowd": 0.2, "fact": 0.8},
        naming_weight=0.3,
        guidance_weight=0.3,
    ),
    "recall": StageConfig("recall", "recall", 2, 20, 1e-3, mixture={"fact": 0.8, "episode": 0.2}),
    "scope": StageConfig("scope", "scope", 2, 1, 1e-3),
    "adapter": StageConfig("adapter", "adapter", 2, 4, 1e-3),
}
RECIPE = Recipe("tiny", "nano", 0, tuple(STAGES.values()), mixed_precision="no")


@pytest.fixture(scope="module")
def emoji(drawn_build) -> EmojiData:
    return load_emoji(drawn_build[0])


@pytest.fixture(scope="module")
def inputs(emoji) -> StageInputs:
    config = stage_config(preset("nano"), [STAGES["vlm"]], False)
    tokenizer = train_tokenizer(tokenizer_corpus(emoji), config.text.vocab_size)
    return StageInputs(config, TextRows(Processor(tokenizer, config)), RECIPE, STAGES["vlm"], emoji)


@pytest.fixture(scope="module")
def tasks() -> dict[str, type[Task]]:
    """The trainer's table, and the task that docs/adding.md adds to it."""
    page = (Path(__file__).parent.parent / "docs/adding.md").read_text()
    section = page.partition("## A training stage\n")[2]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(section.partition("   ```python\n")[2].partition("   ```\n")[0]), names)
    return {name: task_class(name, name) for name in TASKS} | {"adapter": names["AdapterTask"]}


@pytest.fixture(scope="module", params=STAGES)
def task(request, inputs, tasks) -> Task:
    def random_features(emoji: EmojiData, vendors: list[str]) -> dict[str, np.ndarray]:
        """Replace the teacher's features, which need its weights and take minutes."""
        rng = np.random.default_rng(0)
        shape = len(emoji.hexcodes), TEACHER_WIDTH
        return {vendor: rng.random(shape, np.float32).astype(np.float16) for vendor in vendors}

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "teacher_features", random_features)
        result = tasks[request.param](dataclasses.replace(inputs, stage=STAGES[request.param]))
    result.prepare()
    return result


def leaves(batch: Any) -> list[Any]:
    """A batch's tensors, arrays and other values, in order."""
    if isinstance(batch, list | tuple):
        return [leaf for part in batch for leaf in leaves(part)]
    return [batch.numpy() if isinstance(batch, torch.Tensor) else batch]


def same(first: Any, second: Any) -> bool:
    ours, theirs = leaves(first), leaves(second)
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_batch_depends_on_seed_stage_and_step_alone(task):
    torch.manual_seed(1)
    first = task.draw(step_generator(0, 1, 5, 0))
    torch.manual_seed(2)
    other = task.draw(step_generator(0, 1, 6, 0))
    again = task.draw(step_generator(0, 1, 5, 0))
    assert same(first, again)
    assert not same(first, other)


def test_a_batch_has_one_loss(task):
    batch = task.draw(step_generator(0, 1, 5, 0))
    (first, metrics), (second, _) = (task.loss(task.module, batch) for _ in range(2))
    assert torch.isfinite(first)
    assert torch.equal(first, second)
    assert all(value.ndim == 0 for value in metrics.values())
    first.backward()
    trained = [parameter for group in task.parameter_groups() for parameter in group["params"]]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_every_task_is_tested_here(tasks):
    photo = {"photo", "photo-classes", "photo-names", "photo-answers-names", "photo-finish", "photo-memory"}
    assert set(STAGES) | {"captions", "texts"} | photo == set(tasks)


def test_an_unknown_task_is_refused_before_anything_is_written(emoji, tmp_path):
    recipe = msgspec.structs.replace(RECIPE, stages=(StageConfig("last", "polish", 1, 1, 1e-3),))
    with pytest.raises(
        UserError,
        match="stage 'last': unknown task 'polish'; use one of captions, texts, distill, vlm, recall, scope",
    ):
        train(recipe, emoji, tmp_path / "run", print)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mixture", [{"fact": 1.0}, {"caption": 1.0}, {"episode": 1.0}])
def test_a_vlm_stage_without_captions_or_episodes_is_one_sentence(inputs, mixture):
    stage = msgspec.structs.replace(STAGES["vlm"], mixture=mixture)
    with pytest.raises(UserError, match="a vlm stage needs both kinds"):
        VLMTask(dataclasses.replace(inputs, stage=stage))


@pytest.mark.parametrize(
    ("name", "words"),
    [("distill", "comes first"), ("recall", "needs a whole model"), ("scope", "needs a whole")],
)
def test_a_stage_that_cannot_continue_from_the_one_before_says_so(inputs, monkeypatch, name, words):
    monkeypatch.setattr(
        distill,
        "teacher_features",
        lambda emoji, vendors: {
            v: np.ones((len(emoji.hexcodes), TEACHER_WIDTH), np.float16) for v in vendors
        },
    )
    task = task_class(name, name)(dataclasses.replace(inputs, stage=STAGES[name]))
    with pytest.raises(UserError, match=words):
        task.continue_from({"vision.class_token": torch.zeros(1)}, "before")
