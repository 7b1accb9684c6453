"""Facts by text and picture on a backend, and the same file carried on by another one bit for bit."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from microvlm.backends import load
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.memory.conversation import Chat
from microvlm.memory.facts import FactMemory
from microvlm.model.torch_runtime import TorchRuntime

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


class OneKey(TorchRuntime):
    """Keys that are nearly one key, as those of paraphrases are, and that differ a little each time."""

    calls = 0

    def memory_encode(self, inputs_embeds, attention_mask):
        latent, key = super().memory_encode(inputs_embeds, attention_mask)
        self.calls += 1
        return latent, np.float32(np.linspace(1, 2, key.shape[1])[None] + 1e-3 * key + 1e-4 * self.calls)


def test_a_fact_is_named_by_its_words_and_picture_whatever_its_key(ternary_model, tiny_processor):
    facts = FactMemory(OneKey(ternary_model), tiny_processor)
    facts.write("anna", "whose is this?", RED)
    facts.write("carl", "whose is this?", BLUE)
    facts.write("bert", "whose is this?")
    assert [facts.find("whose is this?", image) for image in (RED, BLUE, None)] == [0, 1, 2]
    for question, image in (
        ("who owns this?", RED),
        ("whose is that", RED),
        ("who owns this?", None),
        ("", RED),
    ):
        with pytest.raises(UserError, match="nothing was written under that"):
            facts.find(question, image)
        with pytest.raises(UserError, match="nothing was written under that"):
            facts.overwrite("dora", question, image)
    assert [entry.text[-4:] for entry in facts.entries] == ["anna", "carl", "bert"]


def test_the_picture_is_the_same_in_another_file_and_its_caption_prompt_is_its_question(facts, tmp_path):
    for name in ("a.png", "b.bmp"):
        Image.fromarray(RED).save(tmp_path / name)
    facts.write("mine", image=tmp_path / "a.png")
    facts.write("a heart is red")
    assert facts.find(image=tmp_path / "b.bmp") == 0
    assert facts.find(facts.processor.config.prompt.caption_prompt, RED) == 0
    assert facts.find("a heart is red") == 1


def test_who_finds_nothing_is_told_the_nearest_entry(facts):
    with pytest.raises(UserError, match="nothing was written under that: the memory is empty"):
        facts.find("who?")
    facts.write("anna", "whose\x1b is this?", RED)
    near = r'the nearest is entry 1, asked for by "whose\\x1b is this\?" about %s: .*forget --entry 1'
    with pytest.raises(UserError, match=near % "another picture"):
        facts.find("whose\x1b is this?", BLUE)
    with pytest.raises(UserError, match=near % "a picture"):
        facts.find("whose\x1b is this?")
    facts.forget(0)
    facts.write("anna", "whose is this?")
    with pytest.raises(UserError, match=r'asked for by "whose is this\?" without a picture'):
        facts.find("whose is this?", RED)


def test_an_older_fact_under_the_same_question_is_told(facts):
    facts.write("anna", "whose is this?", RED)
    facts.write("bert", "whose is this?", BLUE)
    facts.write("carl", "whose is this?", RED)
    facts.write("dora", "whose is this?", RED)
    assert [facts.older(index) for index in range(4)] == [None, None, 0, 2]


def test_a_model_that_folds_words_finds_those_that_were_logged_as_typed(facts):
    prompt = dataclasses.replace(facts.processor.config.prompt, fold_text=True)
    config = dataclasses.replace(facts.processor.config, prompt=prompt)
    facts.write("anna", "Whose is THIS?", RED)
    facts.write("bert", " whose is this? ", BLUE)
    folding = FactMemory(facts.runtime, Processor(facts.processor.tokenizer, config), facts.memory)
    assert [folding.find("whose  is this?", image) for image in (RED, BLUE)] == [0, 1]
    entry = folding.write("Carl", "WHOSE IS THIS?", RED)
    assert (entry.question, entry.text) == ("whose is this?", "WHOSE IS THIS? Carl")
    assert folding.older(2) == 0
    with pytest.raises(UserError, match="nothing was written under that"):
        facts.find("whose is this?", BLUE)
    turn = Chat(folding.runtime, folding.processor, memory=folding.memory).ask("What is IT?", RED)
    assert turn.question == "What is IT?"
    assert folding.entries[-1].question == "what is it?"
    assert folding.entries[-1].text.startswith("What is IT? ")


def test_facts_of_an_older_file_are_found_by_their_keys(facts, tmp_path):
    facts.write("anna", "whose is this?", RED)
    facts.write("bert", "whose is this?", BLUE)
    facts.memory.entries[:] = [
        dataclasses.replace(entry, question=None, picture="", value_start=None, cue=None)
        for entry in facts.entries
    ]
    facts.save(tmp_path / "old.mem")
    with safe_open(tmp_path / "old.mem", "np") as file:
        assert [sorted(row) for row in json.loads(file.metadata()["log"])] == [
            ["image", "memory", "text", "time"]
        ] * 2
    facts.load(tmp_path / "old.mem")
    assert facts.find("whose is this?", BLUE) == 1
    with pytest.raises(UserError, match=r'the nearest is entry [12], "whose is this\? (anna|bert)"'):
        facts.find("who owns this?", RED)
    first, second = facts.entries
    aside = np.float32(np.random.default_rng(0).normal(size=first.key.shape))
    aside -= first.key * (aside @ first.key) / (first.key @ first.key)
    tilt = 0.03 * np.linalg.norm(first.key) / np.linalg.norm(aside)  # cosine .99955, as of a paraphrase
    facts.memory.entries[0] = dataclasses.replace(first, key=first.key + tilt * aside)
    with pytest.raises(UserError, match="nothing was written under that"):
        facts.find("whose is this?", RED)
    facts.memory.entries[:] = [first, second]
    facts.overwrite("carl", "whose is this?", RED)
    assert [entry.question for entry in facts.entries] == ["whose is this?", None]
    facts.write("dora", "whose is this?", BLUE)
    assert facts.older(2) == 1
    facts.save(tmp_path / "old.mem")
    facts.load(tmp_path / "old.mem")
    assert [facts.find("whose is this?", image) for image in (RED, BLUE)] == [0, 2]


def test_what_a_chat_wrote_is_found_by_its_words(ternary_model, tiny_processor, tmp_path):
    chat = Chat(OneKey(ternary_model), tiny_processor)
    for question, image, new in (("what is this?", RED, True), ("whose is this?", RED, False)):
        chat.ask(question, image, new_image=new)
    chat.save(tmp_path / "trip.mem")
    facts = FactMemory(OneKey(ternary_model), tiny_processor)
    facts.load(tmp_path / "trip.mem")
    questions = [("what was in the first image?", None), ("what is this?", RED), ("whose is this", RED)]
    assert [facts.find(*question) for question in questions] == [0, 1, 2]


def test_a_fact_longer_than_the_models_positions_is_refused(facts):
    limit = facts.runtime.config.text.max_position_embeddings - 1
    question_tokens = int(facts.processor(["who?"]).attention_mask.sum())
    for text, question, image in (
        ("x" * limit, "who?", None),
        ("x", "y" * limit, RED),
        ("z" * limit, "", None),
    ):
        with pytest.raises(UserError, match=f"more than the {limit} of this model; shorten"):
            facts.write(text, question, image)
    with pytest.raises(UserError, match=f"more than the {limit} of this model"):
        facts.find("y" * limit)
    fits = "x" * (limit - question_tokens)
    assert len(facts.processor.text_ids(fits)) == limit - question_tokens
    facts.write(fits, "who?")
    sentence = f"fact is {limit - question_tokens + 1} tokens and its question {question_tokens},"
    with pytest.raises(UserError, match=sentence):
        facts.overwrite(fits + "x", "who?")
    assert [entry.text for entry in facts.entries] == [f"who? {fits}"]


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
    mean_before = facts.memory.states[0].mean
    assert 0 <= facts.rebuild() < 1e-3
    assert np.abs(facts.memory.states[0].mean - mean_before).max() < 1e-3
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
    for our_state, their_state in zip(ours.memory.states, theirs.memory.states, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(our_state, their_state, strict=True))
    assert theirs.find("what is 17?", RED) == 17
    assert theirs.forget(17).text == "what is 17? number 17"
    theirs.save(tmp_path / "trip.mem")
    ours.load(tmp_path / "trip.mem")
    assert len(ours.entries) == 17
    assert np.array_equal(ours.memory.states[1].covariance, theirs.memory.states[1].covariance)
