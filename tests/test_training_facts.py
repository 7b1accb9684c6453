"""Facts: training and test objects and wordings, batches of facts, and the losses on them."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py")

from microvlm.bench.memory.fact_sets import NAMES as TESTED_NAMES
from microvlm.bench.memory.fact_sets import QUESTIONS
from microvlm.bench.memory.memoryset_reader import load_memoryset
from microvlm.generation import embed_prompt
from microvlm.memory.conversation import with_answer
from microvlm.model.memory_algebra import batch_solution
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.presets import preset
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.batches.fact_batches import FactBatch, FactSampler
from microvlm.training.emoji.data.emoji import load_emoji, read_test_emoji
from microvlm.training.emoji.data.fact_texts import NAMES, RELATIONS, Fact, sample_facts
from microvlm.training.emoji.data.views import corner_neighbour
from microvlm.training.emoji.losses.fact_latents import encode_facts, write_memories
from microvlm.training.emoji.losses.fact_loss import (
    FactHeads,
    other_memory,
)
from microvlm.training.emoji.stages.scope import nearest_of_other_names
from microvlm.training.losses.loss_terms import frame_potential, info_nce
from microvlm.training.recipe import load_recipe


def test_the_tested_objects_are_held_out_and_their_names_and_questions_are_trained():
    tested = {code for code, _ in read_test_emoji()}
    objects = load_memoryset().objects
    assert len({item.hexcode for item in objects}) == 192
    assert not tested & {item.hexcode for item in objects}
    assert set(TESTED_NAMES) <= set(NAMES)
    wordings = {
        wording for relation in RELATIONS for wording in (*relation.image_questions, *relation.text_questions)
    }
    for question, paraphrase in QUESTIONS:
        assert question in wordings
        assert paraphrase not in wordings


def test_facts_name_their_object_and_pairs_about_one_object_differ_in_relation():
    captions = [f"thing {number}" for number in range(400)]
    facts = sample_facts(np.random.default_rng(0), range(400), captions, pictured=False, paired=0.5)
    assert len(facts) == 400
    assert all(f"thing {fact.object}" in fact.write_question for fact in facts)
    assert all(fact.value in RELATIONS[fact.relation].values for fact in facts)
    pairs = [(a, b) for a, b in pairwise(facts) if a.object == b.object]
    assert 100 < len(pairs) < 200
    assert all(a.relation != b.relation for a, b in pairs)
    assert any(fact.write_question != fact.read_question for fact in facts)


def test_a_batch_of_facts_has_two_views_of_one_drawing_and_a_fact_in_every_memory(drawn_build):
    emoji = load_emoji(drawn_build[0])
    sampler = FactSampler(emoji, DrawingSampler(emoji, {}, seen_share=1.0), 20, 0.8)
    assert not emoji.held_out[sampler.rows].any()
    for seed in range(8):
        batch = sampler.sample(np.random.default_rng(seed), torch.Generator().manual_seed(seed))
        assert len(batch.facts) == 20
        assert batch.views.shape == (2 * len(batch.pictured), 3, 96, 96)
        assert not torch.equal(batch.views[0], batch.views[len(batch.pictured)])
        for group in range(batch.group.max() + 1):
            assert batch.is_written[batch.group == group].any()


def test_a_large_batch_is_several_sets_whose_facts_share_no_memory(drawn_build):
    emoji = load_emoji(drawn_build[0])
    drawings = DrawingSampler(emoji, {}, seen_share=1.0)
    # An odd number is divided without loss, into sets of different sizes.
    both = FactSampler(emoji, drawings, 125, 0.8).sample_facts(np.random.default_rng(0))
    rng = np.random.default_rng(0)
    first, second = (FactSampler(emoji, drawings, count, 0.8).sample_facts(rng) for count in (62, 63))
    assert len(both.facts) == 125
    assert both.pictured == first.pictured + second.pictured
    assert both.text_only == first.text_only + second.text_only
    split, later, groups = len(first.pictured), len(second.pictured), first.group.max() + 1
    first_arrays, second_arrays = (first.group, first.is_written), (second.group + groups, second.is_written)
    for whole, before, behind in zip((both.group, both.is_written), first_arrays, second_arrays, strict=True):
        parts = before[:split], behind[:later], before[split:], behind[later:]
        assert (whole == np.concatenate(parts)).all()


def test_another_memory_lacks_a_question_unless_it_holds_the_same_one():
    fact = Fact(3, 0, "whose is this?", "who owns it?", "anna")
    facts = [fact, dataclasses.replace(fact, object=4), fact]
    batch = FactBatch(facts, [], torch.empty(0), np.array([0, 0, 1]), np.array([True, True, True]))
    other, absent = other_memory(batch)
    assert other.tolist() == [1, 1, 0]
    assert absent.tolist() == [False, True, False]
    assert other_memory(batch._replace(is_written=np.array([True, True, False])))[1].tolist() == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("learning", [True, False])
def test_facts_encoded_together_have_the_latents_of_each_encoded_alone(float_model, tiny_processor, learning):
    pictured = [
        Fact(0, 0, "whose is this?", "who is the owner of this?", "anna"),
        Fact(1, 2, "where do i keep this red heart?", "where is it?", "refrigerator"),
        Fact(0, 3, "when?", "since when do i have this?", "may"),
    ]
    text_only = [
        Fact(2, 0, "whose is the kite?", "who owns the kite?", "maximilian"),
        Fact(3, 4, "what do i call the cat?", "its name?", "luna"),
    ]
    views = torch.randn(2 * len(pictured), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = FactBatch(pictured, text_only, views, np.zeros(5, np.int64), np.ones(5, bool))
    # CPUs attend by another kernel where there is something to learn.
    with torch.set_grad_enabled(learning):
        together = encode_facts(float_model, batch, float_model.encode_image(views), TextRows(tiny_processor))

    runtime = TorchRuntime(float_model)

    def alone(question, answer, view):
        """Encode one row, as a runtime does, so that nothing is padded."""
        ids = np.array([tiny_processor.prompt_ids(question, len(view))])
        pixels = view.numpy() if len(view) else None
        prompt = embed_prompt(runtime, ids, np.ones_like(ids), pixels, tiny_processor.image_id)
        return runtime.memory_encode(*with_answer(runtime, prompt, tiny_processor.text_ids(answer)))

    for number, fact in enumerate(batch.facts):
        # Of a fact in words alone, both are empty.
        write_view, read_view = (part[number : number + 1] for part in views.split(len(pictured)))
        _, key = alone(fact.write_question, "", write_view)
        query, query_key = alone(fact.read_question, "", read_view)
        expected = key, *alone(fact.write_question, fact.value, write_view), query, query_key
        for name, part, single in zip(together._fields, together, expected, strict=True):
            # Latents have length 1. Float32 sums in another order differ by 3e-7 at most, counted padding by 0.1.
            np.testing.assert_allclose(part[number].detach(), single[0], rtol=0, atol=1e-5, err_msg=name)


def test_memories_of_several_groups_are_those_of_each_group_alone():
    model = MicroVLM(preset("nano"))
    memory, count = model.config.memory, 11
    generator = torch.Generator().manual_seed(0)
    key, value = (
        torch.randn(count, width, generator=generator) for width in (memory.slots, memory.code_size)
    )
    group, is_written = np.array([2, 0, 1, 2, 2, 0, 2, 1, 2, 0, 2]), np.arange(count) % 4 != 3
    batch = FactBatch([], [], torch.empty(0), group, is_written)
    state = write_memories(model, key, value, batch)
    for number in range(3):
        rows = torch.from_numpy(np.flatnonzero((group == number) & is_written))
        expected_state = batch_solution(
            model.memory_prior, key[rows], value[rows], memory.observation_variance
        )
        for part, expected in zip(state, expected_state, strict=True):
            torch.testing.assert_close(part[number], expected[0])


def test_a_neighbour_covers_a_corner_and_nothing_else():
    images = torch.zeros(16, 3, 96, 96)
    images[8:] = 1
    changed = corner_neighbour(images.clone(), torch.Generator().manual_seed(0), share=1.0) - images
    covered = changed.abs().sum((1, 2, 3)) / 3
    assert ((covered == 0) | ((covered >= 19**2) & (covered <= 32**2))).all()
    assert (covered > 0).sum() > 3
    assert changed[:, :, 33:63].abs().sum() == 0


def test_info_nce_is_low_for_own_partners_and_ignores_what_is_no_negative():
    rows = torch.eye(6)
    alone = np.eye(6, dtype=bool)
    assert info_nce(rows, rows, alone) < 1e-3
    assert info_nce(rows, rows.roll(1, 0), alone) > 5
    twins = rows.clone()
    twins[1] = rows[0]
    same = alone.copy()
    same[0, 1] = same[1, 0] = True
    assert info_nce(twins, twins, same) < 1e-3
    assert info_nce(twins, twins, alone) > 0.2


def test_the_frame_potential_is_least_for_rows_spread_evenly():
    assert frame_potential(torch.eye(8)) == 0
    assert frame_potential(torch.ones(8, 8)) == pytest.approx(1)
    spread = frame_potential(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)))
    assert spread == pytest.approx(1 / 16, abs=2e-3)


def test_the_heads_name_the_value_of_a_read_and_tell_drawings_apart(drawn_build):
    torch.manual_seed(0)
    model = MicroVLM(preset("nano"))
    heads = FactHeads(model)
    values = ["anna", "kitchen", "monday"]
    rows = [heads.index[value] for value in values]
    before, after = (
        10 * torch.nn.functional.normalize(head.weight[rows], dim=1).detach()
        for head in (heads.answer, heads.read_out)
    )
    loss, share = heads.naming_loss(before, after, values)
    assert share == 1
    assert loss < 2
    unlike, rolled_share = heads.naming_loss(before, after.roll(1, 0), values)
    assert rolled_share == 0
    assert unlike > loss
    emoji = load_emoji(drawn_build[0])
    sampler = FactSampler(emoji, DrawingSampler(emoji, {}, seen_share=1.0), 20, 0.8)
    batch = sampler.sample(np.random.default_rng(0), torch.Generator().manual_seed(0))
    features = torch.randn(len(batch.pictured), 66, model.config.vision.hidden_size).repeat(2, 1, 1)
    mixed = torch.cat([features[: len(batch.pictured)], features[: len(batch.pictured)].roll(1, 0)])
    assert heads.drawings(features, 2, batch) < heads.drawings(mixed, 2, batch)


def test_the_nearest_facts_have_other_names_and_the_most_similar_latents():
    latents = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0], [1, 0.1], [1, 0.3], [0, 1], [-1, 0]]), dim=1
    )
    nearest = nearest_of_other_names(latents, torch.tensor([7, 7, 8, 9, 9]), 2)
    assert nearest[0].tolist() == [2, 3]
    assert nearest[2].tolist() == [1, 0]
    assert nearest[3].tolist() == [2, 1]


def test_the_shipped_recipe_trains_facts_and_then_the_scope_detector_on_other_objects():
    stages = {stage.name: stage for stage in load_recipe("nano").stages}
    remember, scope = stages["remember"], stages["scope"]
    assert remember.mixture["fact"] > 0
    assert remember.decoder_bits == scope.decoder_bits == 1.58
    assert scope.task == "scope"
