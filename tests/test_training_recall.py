"""Stage `recall`: pictures that are seen once, and objects that resemble each other dealt together."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py")

from microvlm import MicroVLM
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.training.batches import cached_prefixes as seen
from microvlm.training.batches.drawing_sampler import DrawingSampler
from microvlm.training.batches.fact_batches import FactDealer
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.data.emoji import load_emoji
from microvlm.training.losses.fact_loss import remember
from microvlm.training.recipe import Recipe, StageConfig, load_recipe
from microvlm.training.stages import recall
from microvlm.training.stages.recall import ALIKE_LENGTH, RecallTask
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
    config = stage_config(RECIPE, STAGE, False)
    tokenizer = train_tokenizer(["whose is this?", *emoji.captions], config.text.vocab_size)
    kept = dataclasses.replace(emoji, folder=tmp_path_factory.mktemp("kept"))
    drawn = np.random.default_rng(0).integers(0, 256, (DRAWINGS + 2, 96, 96, 4), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        trained = np.arange(DRAWINGS + 2) < DRAWINGS
        patch.setattr(recall, "load_drawings", lambda _: SimpleNamespace(pixels=drawn, trained=trained))
        made = RecallTask(MicroVLM(config), TextRows(Processor(tokenizer, config)), RECIPE, STAGE, emoji)
    made.emoji = kept
    made.look(made.model)
    return made


def test_two_views_are_of_one_drawing_and_facts_about_an_object_share_it(task):
    pictures = task.pictures
    number = torch.arange(len(pictures.objects))[:, None] * 10 + torch.arange(pictures.prefixes.shape[1])
    marked = pictures._replace(prefixes=number[:, :, None, None].float())
    objects = np.repeat(np.unique(pictures.objects), 3)
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(200):
        written, asked = marked.views(objects, rng).flatten().long().split(len(objects))
        assert (written // 10 == asked // 10).all()
        assert (written != asked).all()
        assert np.array_equal(pictures.objects[written // 10], objects)
        assert (written.view(-1, 3) // 10 == written.view(-1, 3)[:, :1] // 10).all()
        chosen |= set((written // 10).tolist())
    assert chosen == set(range(len(pictures.objects)))


def test_pictures_are_seen_once_and_again_when_the_eyes_change(task, monkeypatch):
    calls = []

    def count(*arguments):
        calls.append(1)
        return task.pictures.prefixes

    monkeypatch.setattr(seen, "see", count)
    task.look(task.model)
    assert calls == []
    bias = next(p for name, p in task.model.vision.named_parameters() if name.endswith("bias"))
    kept = bias.detach().clone()
    with torch.no_grad():
        bias += 1.0
        task.look(task.model)
        bias.copy_(kept)
    assert calls == [1]


def test_what_is_kept_of_a_drawing_is_what_the_model_sees_of_it(task):
    """Of nearly all drawings, one view is nearest to another view of the same, among all drawings' other views."""
    first, last = (
        task.pictures.prefixes[:, view].float().flatten(1)
        for view in (0, task.pictures.prefixes.shape[1] - 1)
    )
    first, last = (torch.nn.functional.normalize(part - part.mean(0), dim=-1) for part in (first, last))
    found = (first @ last.T).argmax(1)
    same = torch.from_numpy(task.pictures.objects)[found] == torch.from_numpy(task.pictures.objects)
    # A model with random weights sees colours and shapes; guessing finds one in hundreds.
    assert same.float().mean() > 10 / len(np.unique(task.pictures.objects))
    assert task.pictures.prefixes.isfinite().all()


def test_other_drawings_are_seen_behind_the_emoji(task):
    behind = len(task.emoji.captions)
    assert set(task.pictures.objects[task.pictures.objects >= behind]) == set(
        range(behind, behind + DRAWINGS)
    )
    rng = np.random.default_rng(0)
    objects = {fact.object for _ in range(5) for fact in task.dealer.facts(rng).shown}
    assert any(row >= behind for row in objects)
    assert any(row < behind for row in objects)


def test_a_stage_without_facts_is_one_sentence(task, emoji):
    stage = dataclasses.replace(STAGE, mixture={"episode": 1.0})
    with pytest.raises(UserError, match="no facts to recall"):
        RecallTask(task.model, task.rows, RECIPE, stage, emoji)


def test_objects_that_resemble_each_other_are_dealt_together(task):
    drawn, told = task._alike_objects(np.random.default_rng(0), 12, 3)
    assert (len(drawn), len(told)) == (12, 3)
    groups = drawn.reshape(-1, ALIKE_LENGTH)
    for one, *others in groups:
        near = {
            int(task.pictures.objects[index])
            for row in np.flatnonzero(task.pictures.objects == one)
            for index in task.alike[row]
        }
        assert set(others) <= near
        assert one not in others


def test_facts_without_pictures_are_the_facts_of_a_batch_with_them(emoji):
    dealer = FactDealer(emoji, DrawingSampler(emoji, {}, 1.0), 20, 0.5)
    whole = dealer.deal(np.random.default_rng(3), torch.Generator().manual_seed(0))
    bare = dealer.facts(np.random.default_rng(3))
    assert bare.facts == whole.facts
    assert np.array_equal(bare.group, whole.group)
    assert np.array_equal(bare.written, whole.written)
    assert len(whole.views) == 2 * len(whole.shown)


def test_answers_are_read_from_what_was_written_and_from_nothing_else(task):
    rng = np.random.default_rng(0)
    facts = task.dealer.facts(rng)
    assert not facts.written.all()
    prefixes = task.pictures.views(np.array([fact.object for fact in facts.shown]), rng)
    asked: list[int] = []

    def cross_entropy(module, embeds, mask, labels, slot, seen):
        assert seen.all()
        asked.append(len(embeds))
        return embeds.new_ones(())

    heads = task.module.facts
    said = remember(task.model, heads, facts, prefixes, task.rows, cross_entropy, unknown_too=False)
    assert sum(asked) == facts.written.sum()
    assert said.metrics["facts"] == pytest.approx(1.0)
    reached = [parameter for _, parameter in task.model.named_parameters() if parameter.requires_grad]
    frozen = [parameter for _, parameter in task.model.named_parameters() if not parameter.requires_grad]
    loss, _ = task.loss(task.module, task.draw(torch.Generator().manual_seed(1)))
    loss.backward()
    heads_reached = [*heads.answer.parameters(), *heads.read_out.parameters()]
    assert all(parameter.grad is not None for parameter in (*reached, *heads_reached))
    assert all(parameter.grad is None for parameter in frozen)


def test_the_shipped_recipe_recalls_between_remembering_and_the_scope_detector():
    stages = load_recipe("nano").stages
    assert [stage.name for stage in stages[-5:]] == [
        "remember",
        "recall",
        "recall-on",
        "remember-on",
        "scope",
    ]
    assert min(stage.drawing_share for stage in stages[-4:]) > 0
