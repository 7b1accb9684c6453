"""Any text comes back as it was told, because a reading of the state points at its entry, and for no other reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from microvlm.backends import load
from microvlm.bench.memory.fact_sets import another_view
from microvlm.bench.memory.memoryset_reader import load_memoryset
from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.bench.memory.open_values.fact_pool import QueryEncoder
from microvlm.config import MemoryConfig, MicroVLMConfig
from microvlm.configuration.pointing import EVIDENCE, PointingConfig, PointingMap, PointingWeights
from microvlm.errors import UserError
from microvlm.inputs.images import load_square
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.facts import FactMemory
from microvlm.memory.pointing.confidence import judge_readings, probability_of
from microvlm.memory.pointing.evidence import Readings, Rows, point
from microvlm.memory.pointing.log_arrays import LogArrays, rows_from, rows_of
from microvlm.memory.pointing.pointer import MOST_STATES, NOT_FOUND, candidate_states
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.runtime import MemoryArrays

VALUES = ("tulip42", "the key is under the red pot", "0815 4711", "пароль", "鍵は赤い鉢の下", "zo'rqa")
QUESTION = "whose is this?"


@pytest.fixture(scope="module", params=["torch", pytest.param("ort", marks=pytest.mark.export)])
def nano(request):
    return load(request.param, "nano", 1)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    objects = load_memoryset()
    return [objects.pixels(item.file) for item in objects.objects[:40]]


def told(model, pictures, values=VALUES) -> FactMemory:
    facts = FactMemory(model)
    for picture, value in zip(pictures, values, strict=False):
        facts.write(value, QUESTION, picture)
    return facts


def test_words_that_no_training_saw_come_back_exactly(nano, pictures, tmp_path):
    facts = told(nano, pictures)
    facts.write("swordfish 7", "what is the wifi code?")
    facts.save(tmp_path / "trip.mem")
    loaded = FactMemory(nano)
    loaded.load(tmp_path / "trip.mem")
    for memory in (facts, loaded):
        for index, (value, picture) in enumerate(zip(VALUES, pictures, strict=False)):
            reading = memory.read(QUESTION, picture)
            assert (reading.answer, reading.from_memory, reading.entry) == (value, True, index)
            assert memory.read("Whose is this", picture).answer == value
            assert memory.read("who owns this?", picture).answer == value
        assert memory.read("what is the wifi code").answer == "swordfish 7"


def test_another_view_of_the_picture_finds_the_text_or_nothing(nano, pictures):
    facts, rng = told(nano, pictures), np.random.default_rng(0)
    answers = [
        facts.read(QUESTION, another_view(picture, pictures[-1], rng)).answer
        for picture in pictures[: len(VALUES)]
    ]
    assert set(answers) <= {*VALUES, NOT_FOUND}
    assert sum(map(str.__eq__, answers, VALUES)) >= 4


def test_strangers_of_every_kind_find_nothing(nano, pictures):
    facts = told(nano, pictures)
    strangers = [(QUESTION, picture) for picture in pictures[10:40]]
    strangers += [("when did i get this?", pictures[0]), ("what is the wifi code?", None), (QUESTION, None)]
    readings = [facts.read(*stranger) for stranger in strangers]
    found = [reading for reading in readings if reading.from_memory]
    assert len(found) <= 2
    assert all(reading.answer == NOT_FOUND for reading in readings if not reading.from_memory)
    assert FactMemory(nano).read(QUESTION, pictures[0]).answer == NOT_FOUND


def with_states(facts: FactMemory, states) -> FactMemory:
    """The same log over other states."""
    return FactMemory(facts.runtime, facts.processor, EpisodicMemory(states, list(facts.entries)))


def test_of_many_states_those_with_the_nearest_rows_are_read():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(30, 8)).astype(np.float32)
    states = [MemoryArrays(np.zeros((1, 8, 8)), np.zeros((1, 8, 8)))] * 10
    entries = [Entry("", key, key, memory=number // 3) for number, key in enumerate(keys)]
    memory = EpisodicMemory(states, entries)
    chosen = candidate_states(2.0 * keys + 0.05 * rng.normal(size=keys.shape), memory, rows_of(memory))
    assert chosen.shape == (30, MOST_STATES)
    assert chosen[:, 0].tolist() == [number // 3 for number in range(30)]
    # A state whose rows are all forgotten comes last, and an empty memory has its one state.
    kept = EpisodicMemory(states[:4], entries[3:12])
    assert candidate_states(keys[:1], kept, rows_of(kept))[0, -1] == 0
    empty = EpisodicMemory(states[:1], [])
    assert candidate_states(keys[:1], empty, rows_of(empty)).tolist() == [[0]]


def test_the_arrays_of_a_log_follow_every_change_of_it():
    rng = np.random.default_rng(0)
    entries = [
        Entry("", rng.normal(size=3), rng.normal(size=8), question=None if number % 2 else "who?")
        for number in range(20)
    ]
    arrays = LogArrays(3, 8)
    for places in (range(3), range(20), [0, 1, 5, 6], [], [7, 0], range(1, 19)):
        told = [entries[place] for place in places]
        for kept, anew in zip(arrays.rows(told), rows_from(told, 3, 8), strict=True):
            assert np.array_equal(kept, anew)


def test_without_its_row_in_the_state_a_text_does_not_come_back_though_the_log_has_it(nano, pictures):
    facts = told(nano, pictures)
    mean, covariance = facts.memory.states[0]
    others = told(nano, pictures, [f"another {number}" for number in range(len(VALUES))])
    elsewhere = told(nano, pictures[20:])
    prior = nano.memory_prior()
    swapped = {
        "zeros": MemoryArrays(np.zeros_like(mean), np.zeros_like(covariance)),
        "zeros, the covariance kept": MemoryArrays(np.zeros_like(mean), covariance),
        "empty": MemoryArrays(*prior),
        "empty, the covariance kept": MemoryArrays(prior.mean, covariance),
        "the same questions with other values": others.memory.states[0],
        "other pictures": elsewhere.memory.states[0],
    }
    for name, state in swapped.items():
        attacked = with_states(facts, [state])
        for picture in pictures[: len(VALUES)]:
            assert attacked.read(QUESTION, picture).answer == NOT_FOUND, name


def test_a_row_that_only_the_state_forgot_does_not_come_back(nano, pictures):
    facts = told(nano, pictures)
    for index, entry in enumerate(facts.entries):
        state = nano.memory_forget(*entry.row, facts.memory.states[0])
        attacked = with_states(facts, [state])
        assert attacked.read(QUESTION, pictures[index]).answer != entry.value
        other = (index + 1) % len(VALUES)
        assert attacked.read(QUESTION, pictures[other]).answer == VALUES[other]


def test_an_overwritten_text_is_gone_and_of_two_under_one_question_the_newer_is_said(nano, pictures):
    facts = told(nano, pictures)
    facts.overwrite("dora 5", QUESTION, pictures[0])
    assert facts.read(QUESTION, pictures[0]).answer == "dora 5"
    facts.write("eve 6", QUESTION, pictures[1])
    assert facts.read(QUESTION, pictures[1]).answer == "eve 6"
    facts.forget(len(facts.entries) - 1)
    assert facts.read(QUESTION, pictures[1]).answer == VALUES[1]


def test_the_decoders_words_are_named_as_such(nano, pictures):
    facts = told(nano, pictures)
    reading = facts.read(QUESTION, pictures[0], source="decoder")
    assert (reading.source, reading.entry) == ("decoder", 0)
    assert reading.answer != VALUES[0], "this decoder has no such word"
    with pytest.raises(UserError, match="give 'entry' or 'decoder'"):
        facts.read(QUESTION, pictures[0], source="log")


def random_rows(count: int, slots: int = 16, width: int = 48) -> tuple[Rows, MemoryArrays, np.ndarray]:
    """(rows, the state of them, the prior mean), by the ridge solution."""
    rng = np.random.default_rng(count)
    basis = np.linalg.qr(rng.normal(size=(width, slots)))[0]
    latents, cues = (rng.normal(size=(count, width)) for _ in range(2))
    latents, cues = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (latents, cues))
    keys, prior = cues @ basis, 0.1 * rng.normal(size=(slots, width))
    covariance = np.linalg.inv(np.eye(slots) + keys.T @ keys / 0.01)
    mean = covariance @ (prior + keys.T @ latents / 0.01)
    state = MemoryArrays(*(part[None].astype(np.float32) for part in (mean, covariance)))
    # Every other row is about a picture.
    picture_keys, question_keys = rng.normal(size=(2, count, slots))
    picture_keys[1::2] = 0
    has_picture = picture_keys.any(1)
    return Rows(keys, latents, cues, picture_keys, question_keys, has_picture), state, prior


def asked(rows: Rows, state: MemoryArrays) -> Readings:
    read, scope = rows.keys @ state.mean[0], np.full(len(rows.keys), 0.5)
    return Readings(rows.keys, rows.cues, read, scope, rows.picture_keys, rows.question_keys)


@pytest.mark.parametrize("count", [1, 2, 16])
def test_a_row_asked_by_its_own_key_has_the_whole_share(count):
    rows, state, prior = random_rows(count)
    pointed = point(asked(rows, state), state, prior, rows, np.arange(count))
    assert pointed.row.tolist() == list(range(count))
    evidence = dict(zip(EVIDENCE, pointed.evidence.T, strict=True))
    for name in ("share", "key_cosine", "cue_agreement", "picture_cosine", "question_cosine"):
        assert np.allclose(evidence[name], 1, atol=1e-3), name
    assert np.array_equal(evidence["log_facts"], np.full(count, np.log(count)))


def test_a_reading_that_is_no_mixture_of_the_log_points_at_nothing():
    rows, state, prior = random_rows(8)
    _, other_state, _ = random_rows(9)
    assert point(asked(rows, other_state), other_state, prior, rows, np.arange(8)).row.tolist() == [-1] * 8
    fewer = Rows(*(part[:0] for part in rows))
    assert point(asked(rows, state), state, prior, fewer, np.arange(0)).row.tolist() == [-1] * 8


def test_a_row_of_another_state_under_the_same_words_makes_a_reading_less_sure():
    rows, state, prior = random_rows(4)
    log = Rows(*(np.concatenate([part, part[:1]]) for part in rows))
    log.question_keys[0] += 1
    queries = Readings(*(part[:1] for part in asked(rows, state)))
    alone, beside = (
        point(queries, state, prior, each, np.arange(4)) for each in (log.take(np.arange(4)), log)
    )
    assert alone.row.tolist() == beside.row.tolist() == [0]
    place = EVIDENCE.index("second_question_cosine")
    assert beside.evidence[0, place] == pytest.approx(1)
    assert alone.evidence[0, place] < 0.9


def test_rows_of_older_files_without_a_cue_take_the_cosine_of_the_keys():
    rows, state, prior = random_rows(4)
    older = rows._replace(cues=np.zeros_like(rows.cues))
    pointed = point(asked(rows, state), state, prior, older, np.arange(4))
    place = EVIDENCE.index("cue_agreement")
    assert np.array_equal(pointed.evidence[:, place], pointed.evidence[:, EVIDENCE.index("key_cosine")])


def test_a_picture_is_unlike_none_and_another_is_told_apart_by_it_alone():
    rows, state, prior = random_rows(4)
    evidence = dict(
        zip(EVIDENCE, point(asked(rows, state), state, prior, rows, np.arange(4)).evidence.T, strict=True)
    )
    # Row 0 has a picture: among the others is one with another picture, and the rest have none.
    unit = rows.picture_keys[[0, 2]] / np.linalg.norm(rows.picture_keys[[0, 2]], axis=1, keepdims=True)
    assert np.isclose(evidence["second_picture_cosine"][0], unit[0] @ unit[1])
    # Row 1 has none. Rows 0 and 2 have, row 3 has none either, and none is no other picture than none.
    assert evidence["second_picture_cosine"][1] == -1
    assert np.allclose(evidence["log_picture_distance"], np.log(1e-4))
    without = asked(rows, state)._replace(picture_keys=np.zeros_like(rows.picture_keys))
    pointed = point(without, state, prior, rows, np.arange(4))
    assert pointed.evidence[:, EVIDENCE.index("picture_cosine")].tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize("older_rows", [slice(None), slice(0, 2)])
def test_rows_of_older_files_without_parts_take_the_cosine_of_the_keys(older_rows):
    rows, state, prior = random_rows(4)
    parts = rows.picture_keys.copy(), rows.question_keys.copy()
    for part in parts:
        part[older_rows] = 0
    older = rows._replace(picture_keys=parts[0], question_keys=parts[1])
    pointed = point(asked(rows, state), state, prior, older, np.arange(4))
    evidence = {name: column[older_rows] for name, column in zip(EVIDENCE, pointed.evidence.T, strict=True)}
    assert np.array_equal(evidence["question_cosine"], evidence["key_cosine"])
    # Row 0 has a picture and row 1 has none.
    assert evidence["picture_cosine"][0] == evidence["key_cosine"][0]
    assert evidence["picture_cosine"][1] == 1
    if older_rows == slice(None):
        assert np.array_equal(evidence["second_question_cosine"], evidence["second_key_cosine"])
    without = point(
        asked(rows, state)._replace(picture_keys=0 * rows.keys), state, prior, older, np.arange(4)
    )
    assert without.evidence[:, EVIDENCE.index("picture_cosine")].tolist() == [-1, 1, -1, 1]


def test_an_entry_keeps_the_keys_of_its_picture_and_of_its_words_alone(
    ternary_model, tiny_processor, pictures, tmp_path
):
    runtime = TorchRuntime(ternary_model)
    model = ModelUnderTest(runtime, tiny_processor)
    facts = FactMemory(runtime, tiny_processor)
    caption = tiny_processor.config.prompt.caption_prompt
    about = facts.write("tulip42", QUESTION, pictures[0])
    alone = facts.write("swordfish 7", QUESTION)
    captioned = facts.write("rose", "", pictures[0])
    sides = tiny_processor.config.vision.image_size
    square = np.asarray(load_square(pictures[0], sides))
    keys = {
        name: model.encode([query])[1][0]
        for name, query in {
            "words": (QUESTION, None),
            "picture": (caption, square),
            "both": (QUESTION, square),
        }.items()
    }
    for entry, names in (
        (about, ("both", "picture", "words")),
        (alone, ("words", None, "words")),
    ):
        for array, name in zip((entry.key, entry.picture_key, entry.question_key), names, strict=True):
            if name is None:
                assert array is None
            else:
                assert np.allclose(array, keys[name], atol=1e-5), name
    assert np.array_equal(captioned.key, captioned.picture_key)
    assert not np.allclose(keys["words"], keys["picture"], atol=1e-3)
    twin = QueryEncoder(model).query((QUESTION, square))
    for array, part in zip((about.key, about.cue, about.picture_key, about.question_key), twin, strict=True):
        assert np.allclose(array, part[0], atol=1e-5)
    facts.save(tmp_path / "trip.mem")
    loaded = FactMemory(runtime, tiny_processor)
    loaded.load(tmp_path / "trip.mem")
    changed, _ = loaded.overwrite("dora 5", QUESTION, pictures[0])[::-1]
    assert np.array_equal(changed.picture_key, about.picture_key)
    assert np.array_equal(loaded.entries[1].question_key, alone.question_key)


def test_the_answer_of_an_entry_is_what_was_told_also_in_older_files():
    arrays = (np.zeros(2, np.float32), np.zeros(3, np.float32))
    assert Entry("a.png: who? anna", *arrays, question="who?", value_start=12).value == "anna"
    assert Entry("a.png: who? anna", *arrays, question="who?").value == "anna"
    assert Entry("who? anna", *arrays).value == "who? anna"
    assert Entry("a.png: anna", *arrays, question="describe").value == "a.png: anna"


def test_the_threshold_and_the_weights_are_read_from_a_configuration():
    weights = PointingWeights(**dict.fromkeys(EVIDENCE, 0.0), constant=2.0)
    config = MicroVLMConfig(memory=MemoryConfig(pointing=PointingConfig(0.25, weights)))
    assert MicroVLMConfig.from_dict(config.to_dict()) == config
    assert probability_of(np.zeros((2, len(EVIDENCE))), weights).tolist() == [1 / (1 + np.exp(-2.0))] * 2
    assert "same_picture" not in config.to_dict()["memory"]["pointing"]
    parts = PointingConfig(0.25, weights, PointingMap(0.5), PointingMap(0.75))
    both = MicroVLMConfig(memory=MemoryConfig(pointing=parts))
    assert MicroVLMConfig.from_dict(both.to_dict()) == both
    with pytest.raises(UserError, match="both or neither"):
        PointingConfig(0.25, weights, PointingMap(0.5))
    raw = config.to_dict()
    del raw["memory"]["pointing"]
    assert MicroVLMConfig.from_dict(raw).memory.pointing == PointingConfig()
    assert "pointing" not in MicroVLMConfig().to_dict()["memory"]
    for path, value, sentence in (
        (("pointing",), {"threshold": 2}, "threshold"),
        (("pointing", "weights"), {"share": "much"}, "share"),
        (("pointing", "weights"), {"weight": 1.0}, "weight"),
    ):
        raw = config.to_dict()
        part = raw["memory"]
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        with pytest.raises(UserError, match=sentence):
            MicroVLMConfig.from_dict(raw)


def test_of_a_query_with_a_picture_both_picture_and_question_must_be_clear():
    def sure_of(name: str, threshold: float) -> PointingMap:
        return PointingMap(
            threshold, PointingWeights(**(dict.fromkeys(EVIDENCE, 0.0) | {name: 1.0}), constant=0.0)
        )

    picture, question = sure_of("picture_cosine", 0.6), sure_of("question_cosine", 0.7)
    pointing = PointingConfig(0.8, sure_of("key_cosine", 0.0).weights, picture, question)
    evidence = np.zeros((5, len(EVIDENCE)))
    columns = [EVIDENCE.index(name) for name in ("picture_cosine", "question_cosine", "key_cosine")]
    evidence[:, columns] = [[2, 2, 0], [0, 2, 9], [2, 0, 9], [0, 0, 9], [2, 2, 0]]
    confidence, is_clear = judge_readings(evidence, np.array([True, True, True, False, False]), pointing)
    assert is_clear.tolist() == [True, False, False, True, False]
    two, half = 1 / (1 + np.exp(-2)), 0.5
    assert np.allclose(confidence, [two * two, half * two, two * half, 1 / (1 + np.exp(-9)), half])
    alone = judge_readings(evidence, np.ones(5, bool), PointingConfig(0.8, pointing.weights))
    assert alone.is_clear.tolist() == [False, True, True, True, False]


def test_no_threshold_lets_an_untrained_model_say_what_the_state_lacks(
    ternary_model, tiny_processor, pictures
):
    runtime = TorchRuntime(ternary_model)
    config = runtime.config
    never = PointingMap(threshold=0.0)
    pointing = PointingConfig(threshold=0.0, same_picture=never, same_question=never)
    runtime.config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, pointing=pointing))
    facts = FactMemory(runtime, tiny_processor)
    for query in (("who?", None), ("who?", pictures[0])):
        facts.write("tulip42", *query)
        assert facts.read(*query).answer == "tulip42"
    attacked = with_states(facts, [runtime.memory_prior()])
    for query in (("who?", None), ("who?", pictures[0])):
        assert attacked.read(*query).answer == NOT_FOUND
