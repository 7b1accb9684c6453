"""Scenes and episodes: held-out pairs stay held out, and every twin changes the answer."""

import hashlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from microvlm.memory.ordinal_questions import ORDINALS
from microvlm.training.emoji.data.episode_texts import sample_episode
from microvlm.training.emoji.data.evalset import plan_scenes
from microvlm.training.emoji.data.scenes import (
    GROUNDS,
    KINDS,
    SIDES,
    hidden_objects,
    read_scene_objects,
    sample_question,
    sample_scene,
)


def held_out(a, b):
    hexcodes = sorted([read_scene_objects()[a.object][0], read_scene_objects()[b.object][0]])
    return int(hashlib.sha256("|".join(hexcodes).encode()).hexdigest(), 16) % 5 == 0


def scenes(test, count=600, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, test) for _ in range(count)]


def test_no_held_out_pair_is_ever_sampled_for_training():
    pairs = [pair for scene in scenes(test=False) for pair in combinations(scene.objects, 2)]
    assert len(pairs) > 600
    assert not any(held_out(a, b) for a, b in pairs)


def test_test_scenes_hold_only_pairs_never_composed_in_training():
    pairs = [pair for scene in scenes(test=True) for pair in combinations(scene.objects, 2)]
    assert len(pairs) > 600
    assert all(held_out(a, b) for a, b in pairs)


def test_a_swapped_twin_changes_the_answer_to_the_same_question():
    questions = 0
    for scene in scenes(test=False):
        if scene.relation is None:
            continue
        twin = {q.text: q.answer for kind in ("what", "where") for q in scene.swapped().questions(kind)}
        for question in scene.questions("what")[:2] + scene.questions("where"):
            assert twin[question.text] != question.answer
            questions += 1
        assert scene.swapped().swapped() == scene
        bags = [sorted(o.object for o in s.objects) for s in (scene, scene.swapped())]
        assert bags[0] == bags[1]
    assert questions > 400


def test_answers_agree_with_where_the_objects_stand():
    for scene in scenes(test=False, count=200):
        if scene.relation is None:
            continue
        for question in scene.questions("where"):
            named_object, other_object = sorted(
                scene.objects, key=lambda o: f"the {o.caption}?" not in question.text
            )
            truth = {
                "left": named_object.x < other_object.x - 0.2,
                "right": named_object.x > other_object.x + 0.2,
                "above": named_object.y < other_object.y - 0.2,
                "below": named_object.y > other_object.y + 0.2,
            }
            assert truth[question.answer]
        for question in scene.questions("what"):
            side = next(s for s in SIDES[scene.relation] if s in question.text.rstrip("?").split())
            assert question.answer == scene.objects[SIDES[scene.relation].index(side)].caption


def test_objects_stay_inside_the_picture_and_do_not_overlap():
    for scene in scenes(test=False, count=300):
        for o in scene.objects:
            assert o.size / 2 <= min(o.x, o.y, 1 - o.x, 1 - o.y) + 1e-9
        for a, b in combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2


def test_no_object_stands_on_a_ground_that_hides_it():
    captions = [caption for _, caption in read_scene_objects()]
    grounds = [name for name, _ in GROUNDS]
    assert hidden_objects()[grounds.index("yellow"), captions.index("star")]
    for scene in scenes(test=False) + scenes(test=True):
        assert not hidden_objects()[scene.ground, [o.object for o in scene.objects]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_is_common_enough_to_guess(kind):
    rng = np.random.default_rng(1)
    answers = Counter(sample_question(rng, kind)[1].answer for _ in range(800))
    assert (
        max(answers.values()) / 800
        < {"what": 0.08, "where": 0.3, "how many": 0.3, "which colour": 0.18}[kind]
    )


def test_the_same_seed_gives_the_same_scenes():
    assert scenes(test=False, count=50, seed=3) == scenes(test=False, count=50, seed=3)
    assert scenes(test=False, count=50, seed=3) != scenes(test=False, count=50, seed=4)


def test_the_planned_evaluation_scenes_are_balanced():
    relations, counting = plan_scenes()
    assert set(Counter(s.relation for s in relations).values()) == {len(relations) // 2}
    assert set(Counter(len(s.objects) for s in counting).values()) == {len(counting) // 4}
    assert set(Counter(s.ground for s in counting).values()) == {len(counting) // len(GROUNDS)}


def test_only_a_scene_with_a_relation_has_a_twin():
    scene = sample_scene(np.random.default_rng(0), relation=False)
    with pytest.raises(ValueError, match="relation"):
        scene.swapped()


@pytest.mark.parametrize("length", [2, 3, 5, 8, 20])
def test_an_episode_twin_shows_the_same_images_and_changes_every_answer(length):
    captions = [f"thing {i}" for i in range(50)]
    episode = sample_episode(np.random.default_rng(0), range(10, 50), captions, length)
    twin = episode.swapped()
    assert sorted(twin.images) == sorted(episode.images)
    assert len(set(episode.images)) == length
    for question, swapped in zip(episode.questions(), twin.questions(), strict=True):
        assert question.text == swapped.text
        assert question.answer != swapped.answer
        assert question.answer == captions[episode.images[question.step]]
    assert episode.questions()[-1].distance == 0
    assert episode.questions()[0].text == "what was in the first image?"


@pytest.mark.parametrize("length", [0, 1, len(ORDINALS) + 1])
def test_an_episode_of_an_impossible_length_is_refused(length):
    with pytest.raises(ValueError, match="2 to 20"):
        sample_episode(np.random.default_rng(0), range(50), ["x"] * 50, length)
