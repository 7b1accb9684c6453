"""The parts of `microvlm-bench memory`: neighbours, drift, addressing, another vendor's drawings, training a fact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microvlm.backends import load
from microvlm.bench.memory.drift import distance, drift, exact_write, plan_steps
from microvlm.bench.memory.edits import neighbours
from microvlm.bench.memory.fact_sets import QUESTIONS, Fact, deal
from microvlm.bench.memory.memoryset_reader import load_memoryset
from microvlm.bench.memory.model_under_test import BATCH, ModelUnderTest
from microvlm.bench.memory.other_vendor import other_vendor
from microvlm.bench.memory.scores import Encoded, addressing, roc
from microvlm.bench.memory.tuning import Learner, tuning, widened
from microvlm.inputs.processor import Processor
from microvlm.memory.episodic import Entry
from microvlm.model.memory_algebra import forget, prior, write
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.runtime import MemoryArrays

SLOTS, WIDTH = 16, 48


@pytest.fixture(scope="module")
def model(speaking_bundle) -> ModelUnderTest:
    return ModelUnderTest(
        load("ort", speaking_bundle, threads=1), Processor.from_pretrained(speaking_bundle), 3
    )


@pytest.fixture(scope="module")
def encoded(model) -> Encoded:
    return Encoded(model, deal(load_memoryset(), 24))


def pool(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(count, WIDTH))
    latents /= np.linalg.norm(latents, axis=1, keepdims=True)
    return (rng.normal(size=(count, SLOTS)) / WIDTH**0.5).astype(np.float32), latents.astype(np.float32)


def test_neighbours_are_of_four_kinds_and_none_was_written():
    picture = np.zeros((8, 8, 3), np.uint8)
    (first, rewording), (second, _) = QUESTIONS
    facts = [
        Fact(number, first, rewording, "anna", picture, picture + number, picture) for number in range(5)
    ]
    duplicate = Fact(0, second, second, "ben", picture, picture, picture)
    kinds = neighbours([*facts[:2], duplicate], [*facts[2:], facts[2]], "describe the image")
    assert [(question, int(image[0, 0, 0])) for question, image in kinds["other_caption"]] == [
        ("describe the image", 2),
        ("describe the image", 3),
        ("describe the image", 4),
    ]
    assert [int(image[0, 0, 0]) for _, image in kinds["other_object"]] == [2, 3, 4]
    assert {question for question, _ in kinds["other_object"]} == {first, second}
    assert [(question, int(image[0, 0, 0])) for question, image in kinds["other_question"]] == [
        ("describe the image", 0),
        ("describe the image", 1),
        (second, 1),
        ("describe the image", 0),
    ]
    few = neighbours(facts[:2], facts[2:], "describe the image", most=2)
    assert [len(kind) for kind in few.values()] == [1, 1, 2, 2]
    # Those most like the written ones come first, and are not just other objects.
    assert [int(image[0, 0, 0]) for _, image in few["like_object"]] == [2, 3]
    assert [int(image[0, 0, 0]) for _, image in few["other_object"]] == [4]


def test_a_plan_never_holds_a_row_twice_nor_more_rows_than_slots():
    live: list[int] = []
    plan = plan_steps(20, SLOTS, 1000)
    assert {step.name for step in plan} == {"write", "forget", "overwrite"}
    for step in plan:
        if step.name == "write":
            live.append(step.new)
        elif step.name == "forget":
            del live[step.place]
        else:
            live[step.place] = step.new
        assert len(set(live)) == len(live) <= SLOTS
    assert plan == plan_steps(20, SLOTS, 1000)
    assert {step.place for step in plan_steps(2, SLOTS, 50)} == {-1, 0}


def test_the_float64_that_drift_is_measured_from_is_the_pytorch_functions():
    keys, latents = pool(6)
    state = MemoryArrays(np.zeros((SLOTS, WIDTH)), np.eye(SLOTS))
    theirs = prior(torch.zeros(SLOTS, WIDTH, dtype=torch.float64))
    for number, row in enumerate(zip(keys, latents, strict=True)):
        state = exact_write(state, Entry("", *row), 0.01)
        theirs = write(theirs, *(torch.from_numpy(part)[None].double() for part in row), 0.01)
        if number == 3:
            state = exact_write(state, Entry("", *row), -0.01)
            theirs = forget(theirs, *(torch.from_numpy(part)[None].double() for part in row), 0.01)
    assert distance(MemoryArrays(*(part.numpy() for part in theirs)), state) < 1e-12


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_a_thousand_steps_stay_near_float64_and_a_rebuild_restores_them(backend, speaking_bundle):
    result = drift(load(backend, speaking_bundle, threads=1), *pool(60))
    assert result["steps"] == result["writes"] + result["forgets"] + result["overwrites"] == 1000
    assert 0 < result["after_rebuild"] < result["float32_vs_float64"] < 1e-2
    assert result["after_rebuild"] < 1e-4
    assert result["without_rebuilds"] > result["float32_vs_float64"]


def test_questions_and_turns_encoded_together_have_the_latents_of_each_alone(model):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(3)]
    queries = [
        ("whose is this?", pictures[0]),
        ("where do i keep this red heart?", pictures[1]),
        ("when?", None),
        ("what do i call the cat?", pictures[2]),
    ]
    answers = ["anna", "in the refrigerator", "may", "luna"]
    # A full batch and two more, so that a batch ends somewhere within.
    many = [queries[number % 4] for number in range(BATCH + 2)]
    latents, keys = model.encode(many)
    values = model.encode_values(many, [answers[number % 4] for number in range(BATCH + 2)])
    for number, (query, answer) in enumerate(zip(queries, answers, strict=True)):
        (latent,), (key,) = model.encode([query])
        (value,) = model.encode_values([query], [answer])
        # An int8 activation near a tie may round the other way in a batch: a thousandth of its range.
        for row in range(number, BATCH + 2, 4):
            assert np.abs(latents[row] - latent).max() < 1e-2
            assert np.abs(keys[row] - key).max() < 1e-2
            assert np.abs(values[row] - value).max() < 1e-2
    apart = [np.abs(values[a] - values[b]).max() for a in range(4) for b in range(a)]
    assert min(apart) > 5e-2, "other turns have other latents, or nothing was compared"


def test_slot_use_is_what_the_covariance_lost_and_equal_keys_use_few_slots(model, encoded):
    result = addressing(model, encoded, 8)
    assert np.array(result["weights"]).shape == (8, SLOTS)
    assert 0 < min(result["slot_use"]) <= max(result["slot_use"]) < 1
    # What all slots lost together is what eight rows can take from an identity at most.
    assert sum(result["slot_use"]) < 8
    assert 1 < result["effective_slots"] < SLOTS


def test_a_roc_goes_from_corner_to_corner_with_its_corners_alone():
    high, low = np.array([0.9, 0.8, 0.4, 0.3]), np.array([0.5, 0.1])
    assert roc(high, low) == [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    assert roc(low, low) == [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]


def test_another_vendors_drawings_are_asked_for_beside_the_nearest_neighbour(model, encoded):
    result = other_vendor(model, encoded, 8)
    assert (result["facts"], result["recall"]) == (8, 0)
    right = 0
    for fact in encoded.facts[:8]:
        assert not np.array_equal(fact.other_vendor_view, fact.query_view)
        latents, _ = model.encode([(fact.question, fact.other_vendor_view)])
        right += encoded.names[int((encoded.latents[:8] @ latents[0]).argmax())] == fact.name
    assert result["nearest_neighbour"] == right / 8


@pytest.fixture(scope="module")
def learner(speaking_bundle) -> tuple[TorchRuntime, Learner]:
    runtime = load("torch", speaking_bundle, threads=1)
    student = TorchRuntime(widened(runtime.model), directory=runtime.directory)
    return runtime, Learner(ModelUnderTest(student, Processor.from_pretrained(speaking_bundle), 3))


def test_a_widened_decoder_holds_the_stored_values_in_float(learner):
    runtime, taught = learner
    packed_mlp, float_mlp = runtime.model.decoder.layers[0].mlp, taught.model.decoder.layers[0].mlp
    assert isinstance(float_mlp.up_proj, torch.nn.Linear)
    assert torch.equal(float_mlp.up_proj.weight, packed_mlp.up_proj.integers() * packed_mlp.up_proj.scale)
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    # The stored one rounds its activations to int8; nothing else differs.
    assert (float_mlp(x) - packed_mlp(x)).abs().max() < 0.05 * packed_mlp(x).abs().max()
    ids = torch.arange(9)
    assert torch.equal(taught.model.embed(ids), runtime.model.embed(ids))


def test_a_fact_is_trained_in_until_it_is_answered_and_then_taken_back(learner, encoded):
    _, taught = learner
    fact = encoded.facts[0]
    start = {name: tensor.clone() for name, tensor in taught.model.decoder.state_dict().items()}
    tuning = taught.learn(fact, 1e-3)
    assert tuning.right
    assert tuning.steps > 0
    prompts = [(fact.question, fact.written_view)]
    model_under_test = ModelUnderTest(taught.student.runtime, taught.student.processor, 12)
    assert model_under_test.answers(prompts, None) == [fact.name]
    taught.restore()
    assert all(torch.equal(start[name], now) for name, now in taught.model.decoder.state_dict().items())
    assert model_under_test.answers(prompts, None) != [fact.name]


def test_both_ways_of_telling_a_fact_are_timed_and_scored(model, encoded, speaking_bundle):
    result = tuning(model, encoded, str(speaking_bundle), 1, 1)
    assert result["tuned"] == 1
    assert result["written"] == 0
    assert min(result[name] for name in ("steps", "tuning_ms", "write_ms", "write_torch_ms")) > 0
    assert result["tuning_over_write"] == pytest.approx(result["tuning_ms"] / result["write_ms"], rel=0.1)
    assert result["neighbours"] == 26
    # The gate has learned nothing here: any share of the neighbours may keep its answer.
    for name in ("tuned_neighbourhood", "written_neighbourhood"):
        assert 26 * result[name] == pytest.approx(round(26 * result[name]))
        assert 0 <= result[name] <= 1
