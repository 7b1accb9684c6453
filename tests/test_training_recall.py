"""Stage `recall`: prefix embeddings are computed once, and objects that resemble each other share a batch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py")

from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.presets import preset
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.batches import cached_prefixes
from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.batches.fact_batches import FactSampler
from microvlm.training.emoji.data.emoji import load_emoji
from microvlm.training.emoji.losses.fact_loss import fact_losses
from microvlm.training.emoji.stages import recall
from microvlm.training.emoji.stages.recall import ALIKE_LENGTH, RecallTask
from microvlm.training.recipe import Recipe, StageConfig, load_recipe
from microvlm.training.stages.task import StageInputs
from microvlm.training.tokenizer_training import train_tokenizer
from microvlm.training.trainer import stage_config

MIXTURE = {"fact": 0.8, "episode": 0.1}
STAGE = StageConfig("recall", "recall", 1, 20, 1e-3, decoder_bits=1.58, mixture=MIXTURE, drawing_share=0.5)
DRAWINGS = 6
RECIPE = Recipe("tiny", "nano", 0, (STAGE,), mixed_precision="no")


@pytest.fixture(scope="module")
def emoji(drawn_build):
    return load_emoji(drawn_build[0])


@pytest.fixture(scope="module")
def task(emoji, tmp_path_factory):
    torch.manual_seed(0)
    config = stage_config(preset("nano"), [STAGE], False)
    tokenizer = train_tokenizer(["whose is this?", *emoji.captions], config.text.vocab_size)
    small_set = dataclasses.replace(emoji, folder=tmp_path_factory.mktemp("kept"))
    drawn = np.random.default_rng(0).integers(0, 256, (DRAWINGS + 2, 96, 96, 4), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        trained = np.arange(DRAWINGS + 2) < DRAWINGS
        patch.setattr(recall, "load_drawings", lambda _: SimpleNamespace(pixels=drawn, trained=trained))
        rows = TextRows(Processor(tokenizer, config))
        result = RecallTask(StageInputs(config, rows, RECIPE, STAGE, emoji))
    result.emoji = small_set
    result.prepare()
    return result


def test_two_views_show_one_drawing_which_facts_about_an_object_share(task):
    cache = task.cache
    number = torch.arange(len(cache.objects))[:, None] * 10 + torch.arange(cache.prefixes.shape[1])
    marked = cache._replace(prefixes=number[:, :, None, None].float())
    objects = np.repeat(np.unique(cache.objects), 3)
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(200):
        first, second = marked.views(objects, rng).flatten().long().split(len(objects))
        assert (first // 10 == second // 10).all()
        assert (first != second).all()
        assert np.array_equal(cache.objects[first // 10], objects)
        assert (first.view(-1, 3) // 10 == first.view(-1, 3)[:, :1] // 10).all()
        chosen |= set((first // 10).tolist())
    assert chosen == set(range(len(cache.objects)))


def test_views_are_encoded_once_and_again_when_the_vision_encoder_changes(task, monkeypatch):
    calls = []

    def count(*arguments):
        calls.append(1)
        return task.cache.prefixes

    monkeypatch.setattr(cached_prefixes, "encode_views", count)
    task.prepare()
    assert calls == []
    bias = next(p for name, p in task.model.vision.named_parameters() if name.endswith("bias"))
    bias_before = bias.detach().clone()
    with torch.no_grad():
        bias += 1.0
        task.prepare()
        bias.copy_(bias_before)
    assert calls == [1]


def test_cached_views_of_one_drawing_resemble_each_other(task):
    """The nearest of all drawings' last views is far more often one of the same object than by chance."""
    first, last = (
        task.cache.prefixes[:, view].float().flatten(1) for view in (0, task.cache.prefixes.shape[1] - 1)
    )
    first, last = (torch.nn.functional.normalize(part - part.mean(0), dim=-1) for part in (first, last))
    nearest = (first @ last.T).argmax(1)
    same = torch.from_numpy(task.cache.objects)[nearest] == torch.from_numpy(task.cache.objects)
    # A model with random weights sees colours and shapes; guessing finds one in hundreds.
    assert same.float().mean() > 10 / len(np.unique(task.cache.objects))
    assert task.cache.prefixes.isfinite().all()


def test_objects_of_other_drawings_follow_the_emoji(task):
    emoji_count = len(task.emoji.captions)
    assert set(task.cache.objects[task.cache.objects >= emoji_count]) == set(
        range(emoji_count, emoji_count + DRAWINGS)
    )
    rng = np.random.default_rng(0)
    objects = {fact.object for _ in range(5) for fact in task.fact_sampler.sample_facts(rng).pictured}
    assert any(row >= emoji_count for row in objects)
    assert any(row < emoji_count for row in objects)


def test_a_stage_without_facts_is_one_sentence(task, emoji):
    stage = msgspec.structs.replace(STAGE, mixture={"episode": 1.0})
    with pytest.raises(UserError, match="no facts to recall"):
        RecallTask(StageInputs(task.config, task.rows, RECIPE, stage, emoji))


def test_objects_that_resemble_each_other_share_a_batch(task):
    pictured, text_only = task.alike_objects(np.random.default_rng(0), 12, 3)
    assert (len(pictured), len(text_only)) == (12, 3)
    groups = pictured.reshape(-1, ALIKE_LENGTH)
    for first, *others in groups:
        near = {
            int(task.cache.objects[index])
            for row in np.flatnonzero(task.cache.objects == first)
            for index in task.alike[row]
        }
        assert set(others) <= near
        assert first not in others


def test_facts_without_pictures_are_the_facts_of_a_batch_with_them(emoji):
    sampler = FactSampler(emoji, DrawingSampler(emoji, {}, 1.0), 20, 0.5)
    whole = sampler.sample(np.random.default_rng(3), torch.Generator().manual_seed(0))
    bare = sampler.sample_facts(np.random.default_rng(3))
    assert bare.facts == whole.facts
    assert np.array_equal(bare.group, whole.group)
    assert np.array_equal(bare.is_written, whole.is_written)
    assert len(whole.views) == 2 * len(whole.pictured)


def test_only_written_facts_are_answered_and_only_the_memory_parts_learn(task):
    rng = np.random.default_rng(0)
    facts = task.fact_sampler.sample_facts(rng)
    assert not facts.is_written.all()
    prefixes = task.cache.views(np.array([fact.object for fact in facts.pictured]), rng)
    answered: list[int] = []

    def cross_entropy(module, embeds, mask, labels, slot, slot_visible):
        assert slot_visible.all()
        answered.append(len(embeds))
        return embeds.new_ones(())

    heads = task.module.facts
    losses = fact_losses(task.model, heads, facts, prefixes, task.rows, cross_entropy, teach_unknown=False)
    assert sum(answered) == facts.is_written.sum()
    assert losses.metrics["facts"] == pytest.approx(1.0)
    reached = [parameter for _, parameter in task.model.named_parameters() if parameter.requires_grad]
    frozen = [parameter for _, parameter in task.model.named_parameters() if not parameter.requires_grad]
    loss, _ = task.loss(task.module, task.draw(torch.Generator().manual_seed(1)))
    loss.backward()
    heads_reached = [*heads.answer.parameters(), *heads.read_out.parameters()]
    assert all(parameter.grad is not None for parameter in (*reached, *heads_reached))
    assert all(parameter.grad is None for parameter in frozen)


def test_the_shipped_recipe_trains_recall_between_whole_model_stages_and_the_scope_detector_last():
    stages = load_recipe("nano").stages
    assert [stage.name for stage in stages[-5:]] == [
        "remember",
        "recall",
        "recall-on",
        "remember-on",
        "scope",
    ]
    assert min(stage.drawing_share for stage in stages[-4:]) > 0
