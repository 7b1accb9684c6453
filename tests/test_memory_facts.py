"""Facts by text and picture on a backend, and the same file carried on by another one bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from microvlm.backends import load
from microvlm.errors import UserError
from microvlm.facts import FactMemory
from microvlm.processor import Processor
from microvlm.torch_runtime import TorchRuntime

RED, BLUE = (np.full((20, 20, 3), colour, np.uint8) for colour in ((220, 20, 20), (20, 20, 220)))


@pytest.fixture
def facts(ternary_model, tiny_processor) -> FactMemory:
    return FactMemory(TorchRuntime(ternary_model), tiny_processor)


def test_a_fact_is_logged_under_the_key_of_its_question_and_picture(facts):
    entry = facts.write("it is mine", "whose bicycle is this?", RED, label="bike.png")
    assert entry.text == "bike.png: whose bicycle is this? it is mine"
    assert facts.find("whose bicycle is this?", RED) == 0
    for question, image in (("whose bicycle is this?", BLUE), ("whose bicycle is this?", None), ("", RED)):
        with pytest.raises(UserError, match="nothing was written under that"):
            facts.find(question, image)


def test_a_read_is_pulled_to_what_was_written_and_changes_nothing(facts):
    before = facts.read("who?").residual
    facts.write("a red heart", "who?")
    state = [part.copy() for part in facts.memory.states[0]]
    first, second = facts.read("who?"), facts.read("who?")
    assert first.tokens == second.tokens
    assert first.residual == second.residual != before
    assert all(np.array_equal(a, b) for a, b in zip(state, facts.memory.states[0], strict=True))


def test_forget_overwrite_and_reset_change_log_and_state(facts):
    for text in ("one", "two", "three"):
        facts.write(text, f"what is {text}?")
    old, new = facts.overwrite("deux", "what is two?")
    assert (old.text, new.text) == ("what is two? two", "what is two? deux")
    assert facts.forget(0).text == "what is one? one"
    assert [entry.text for entry in facts.entries] == ["what is two? deux", "what is three? three"]
    kept = facts.memory.states[0].mean
    assert 0 <= facts.rebuild() < 1e-3
    assert np.abs(facts.memory.states[0].mean - kept).max() < 1e-3
    facts.reset()
    assert facts.entries == []
    assert np.array_equal(facts.memory.states[0].mean, facts.runtime.memory_prior().mean)


def test_mistakes_are_sentences(facts):
    with pytest.raises(UserError, match="text of the fact"):
        facts.write("", "who?")
    with pytest.raises(UserError, match="a question, a picture or both"):
        facts.read()
    with pytest.raises(UserError, match="no entry 1: the memory has 0"):
        facts.forget(0)


def test_a_file_is_carried_on_by_another_backend_bit_for_bit(speaking_bundle, tmp_path):
    processor = Processor.from_pretrained(speaking_bundle)
    ours, theirs = (
        FactMemory(load(name, speaking_bundle, threads=1), processor) for name in ("torch", "ort")
    )
    for number in range(18):
        ours.write(f"number {number}", f"what is {number}?", RED if number % 2 else BLUE)
    assert len(ours.memory.states) == 2
    ours.save(tmp_path / "trip.mem")
    theirs.load(tmp_path / "trip.mem")
    for one, other in zip(ours.memory.states, theirs.memory.states, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert theirs.find("what is 17?", RED) == 17
    assert theirs.forget(17).text == "what is 17? number 17"
    theirs.save(tmp_path / "trip.mem")
    ours.load(tmp_path / "trip.mem")
    assert len(ours.entries) == 17
    assert np.array_equal(ours.memory.states[1].covariance, theirs.memory.states[1].covariance)
