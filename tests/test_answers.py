"""How sure an answer is: confidences, declined answers, and the likeliest answers against all that there are."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

import microvlm
from microvlm.answers.answering import Answer
from microvlm.answers.likeliest import find_likeliest
from microvlm.commands.main import cli
from microvlm.config import AnswersConfig, MicroVLMConfig
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, Prompt, generate
from microvlm.loaded_model import LoadedModel

PICTURE = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
OPTIONS = GenerationOptions(max_new_tokens=4)
STOP, VOCABULARY = 0, 5


class TableRuntime:
    """A model whose next token depends on all tokens before it, drawn by their hash. An embedding is a one-hot row."""

    def __init__(self, seed: int):
        self.seed, self.config = seed, tiny_config()

    def row(self, ids: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng([self.seed, *ids]).normal(scale=2, size=VOCABULARY).astype(np.float32)

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        return np.eye(VOCABULARY, dtype=np.float32)[ids]

    def empty_slot(self, batch: int) -> np.ndarray:
        return np.full((batch, 1), -1)

    def decode(self, embeds: np.ndarray, mask: np.ndarray, positions: Any, past: Any, keep: int = 1) -> Any:
        ids = np.concatenate([past, embeds.argmax(-1)], 1)
        ends = range(ids.shape[1] - keep + 1, ids.shape[1] + 1)
        logits = [
            [self.row(tuple(row[:end][seen[:end] > 0].tolist())) for end in ends]
            for row, seen in zip(ids, mask, strict=True)
        ]
        return np.array(logits), ids


def all_answers(runtime: TableRuntime, prompt: tuple[int, ...], longest: int) -> dict[tuple[int, ...], float]:
    """Every answer of at most `longest` tokens and its log probability."""
    answers = {}
    for length in range(longest + 1):
        for tokens in itertools.product(range(1, VOCABULARY), repeat=length):
            spoken = tokens if length == longest else (*tokens, STOP)
            value = 0.0
            for step, token in enumerate(spoken):
                logits = runtime.row((*prompt, *spoken[:step])).astype(np.float64)
                value += logits[token] - np.log(np.exp(logits).sum())
            answers[tokens] = value
    return answers


def text(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_likeliest_of_all_answers(seed: int) -> None:
    runtime, ids = TableRuntime(seed), np.array([[3, 1, 2]])
    prompt = Prompt(runtime.embed_tokens(ids), np.array([[0, 1, 1]]))
    options = GenerationOptions(max_new_tokens=3, stop_tokens=(STOP,))
    expected = sorted(all_answers(runtime, (1, 2), 3).items(), key=lambda item: -item[1])
    found = find_likeliest(runtime, prompt, options, None, 3, text, width=5, rounds=30)
    assert [answer for answer, _ in found] == [text(list(tokens)) for tokens, _ in expected[:3]]
    assert np.allclose([value for _, value in found], [value for _, value in expected[:3]], atol=1e-6)
    odd = find_likeliest(
        runtime, prompt, options, None, 2, text, lambda words: "1" in words, width=5, rounds=30
    )
    wanted = [text(list(tokens)) for tokens, _ in expected if 1 in tokens]
    assert [answer for answer, _ in odd] == wanted[:2]


def test_a_small_search_gives_the_greedy_answer_and_others_in_falling_order() -> None:
    for seed in range(12):
        runtime = TableRuntime(seed)
        prompt = Prompt(runtime.embed_tokens(np.array([[1, 2]])), np.ones((1, 2), np.int64))
        options = GenerationOptions(max_new_tokens=3, stop_tokens=(STOP,))
        greedy = generate(runtime, prompt, options)
        found = dict(find_likeliest(runtime, prompt, options, None, 20, text))
        assert found[text(greedy.tokens[0])] == pytest.approx(greedy.log_probability(0), abs=1e-6)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        every = {text(list(tokens)): value for tokens, value in all_answers(runtime, (1, 2), 3).items()}
        assert all(abs(every[answer] - value) < 1e-6 for answer, value in found.items())


def calibrated(checkpoint: Path, folder: Path, answers: AnswersConfig) -> Path:
    """A copy of a checkpoint with this calibration."""
    shutil.copytree(checkpoint, folder)
    dataclasses.replace(MicroVLMConfig.load(folder), answers=answers).save(folder)
    return folder


@pytest.fixture(scope="module")
def plain(speaking_checkpoint: Path) -> LoadedModel:
    return microvlm.load(speaking_checkpoint, backend="torch")


@pytest.fixture(scope="module")
def own(plain: LoadedModel) -> Answer:
    """The answer of the model without a calibration."""
    answer = plain.answer(PICTURE, options=OPTIONS)
    assert isinstance(answer, Answer)
    return answer


@pytest.fixture(scope="module")
def unsure(speaking_checkpoint: Path, own: Answer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has the confidence .25 in its answer about `PICTURE` and needs .5."""
    points = (own.log_probability - 2, own.log_probability + 2)
    answers = AnswersConfig(points, (0.0, 0.5), 0.5, decline="no idea")
    return calibrated(speaking_checkpoint, tmp_path_factory.mktemp("unsure") / "model", answers)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(PICTURE).save(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Arguments -> (status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            run_click(cli, [str(argument) for argument in arguments])
        return exit_info.value.code, *capsys.readouterr()

    return call


def test_a_model_without_a_calibration_has_no_confidence_and_declines_nothing(plain, own):
    assert (own.confidence, own.declined, own.guesses) == (None, False, None)
    assert own.text == own.own_text == plain.generate(PICTURE, max_new_tokens=4)
    with pytest.raises(UserError, match=r"^--min-confidence needs a model whose answers were calibrated"):
        plain.answer(PICTURE, options=OPTIONS, min_confidence=0.5)
    assert plain.answer(PICTURE, options=OPTIONS, min_confidence=0) == own


def test_an_answer_below_the_threshold_is_declined_and_one_above_it_is_said(unsure: Path, own: Answer):
    model = microvlm.load(unsure, backend="torch")
    answer = model.answer(PICTURE, options=OPTIONS)
    assert answer.confidence == pytest.approx(0.25)
    assert (answer.text, answer.own_text, answer.declined) == ("no idea", own.text, True)
    assert model.generate(PICTURE, options=OPTIONS) == "no idea"
    assert model.generate([PICTURE, PICTURE], options=OPTIONS) == ["no idea"] * 2
    for least in (0, 0.2):
        said = model.answer(PICTURE, options=OPTIONS, min_confidence=least)
        assert (said.text, said.declined, said.confidence) == (own.text, False, answer.confidence)
    assert model.answer(PICTURE, options=OPTIONS, min_confidence=0.3).declined
    with pytest.raises(UserError, match=r"^--min-confidence is 1.5; give 0 to 1\.$"):
        model.answer(PICTURE, options=OPTIONS, min_confidence=1.5)


def test_an_answer_that_declines_in_its_own_words_is_declined_however_sure_it_is(
    speaking_checkpoint: Path, own: Answer, tmp_path: Path
):
    answers = AnswersConfig((-50.0, -1.0), (0.9, 1.0), 0.1, declining=(own.text,))
    model = microvlm.load(calibrated(speaking_checkpoint, tmp_path / "model", answers), backend="torch")
    answer = model.answer(PICTURE, options=OPTIONS, guesses=2)
    assert (answer.text, answer.declined, answer.confidence) == (own.text, True, None)
    assert own.text not in [guess.text for guess in answer.guesses]
    assert len(answer.guesses) == 2


def test_an_answer_that_can_see_the_memory_has_no_confidence(unsure: Path, own: Answer):
    model = microvlm.load(unsure, backend="torch")
    facts = microvlm.FactMemory(model)
    facts.write("anna", question="who?")
    shown = model.answer(prompts="who?", options=OPTIONS, memory=facts)
    hidden = model.answer(prompts="who?", options=OPTIONS)
    assert (shown.confidence is None) == shown.from_memory
    assert hidden.confidence is not None
    assert not hidden.from_memory


def test_guesses_are_the_likeliest_answers_of_each_row_with_their_confidence(unsure: Path):
    model = microvlm.load(unsure, backend="torch")
    together = model.answer([PICTURE, PICTURE], ["what is this?", "a"], options=OPTIONS, guesses=2)
    for question, answer in zip(["what is this?", "a"], together, strict=True):
        first, second = answer.guesses
        assert first.log_probability >= second.log_probability
        assert first.log_probability >= answer.log_probability - 1e-5
        assert first.confidence == model.config.answers.confidence(first.log_probability)
        alone = model.answer(PICTURE, question, options=OPTIONS, guesses=2)
        assert [guess.text for guess in alone.guesses] == [first.text, second.text]
    with pytest.raises(UserError, match="guesses= is 17; give 0 to 16"):
        model.answer(PICTURE, guesses=17)


def test_caption_prints_the_declining_sentence_and_its_guesses_with_status_0(unsure, own, picture, run):
    flags = ("caption", picture, "--model", unsure, "--backend", "torch", "--max-new-tokens", 4)
    assert run(*flags) == (0, "no idea\n", "")
    status, out, _ = run(*flags, "--guesses")
    lines = out.splitlines()
    assert (status, lines[0], len(lines)) == (0, "no idea", 3)
    assert all(line.startswith("  ") and "(confidence 0." in line for line in lines[1:])
    assert run(*flags, "--min-confidence", 0) == (0, f"{own.text}\n", "")
    assert run(*flags, "--min-confidence", 7) == (2, "", "Error: --min-confidence is 7; give 0 to 1.\n")


def test_json_of_a_caption_has_confidence_declined_and_guesses(
    unsure, own, picture, run, speaking_checkpoint
):
    flags = ("--backend", "torch", "--max-new-tokens", 4, "--json")
    document = json.loads(run("caption", picture, *flags, "--model", unsure, "--guesses")[1])
    assert document["caption"] == "no idea"
    assert document["confidence"] == pytest.approx(0.25)
    assert document["declined"] is True
    assert [set(guess) for guess in document["guesses"]] == [{"text", "log_probability", "confidence"}] * 2
    plain = json.loads(run("caption", picture, *flags, "--model", speaking_checkpoint)[1])
    assert plain["caption"] == own.text
    assert (plain["confidence"], plain["declined"], plain["guesses"]) == (None, False, None)
    several = json.loads(
        run("caption", picture, picture, *flags, "--model", unsure, "--min-confidence", 0)[1]
    )
    assert [result["declined"] for result in several["results"]] == [False, False]
    assert several["results"][0]["confidence"] == document["confidence"]


def test_chat_declines_remembers_what_it_said_and_guesses_when_asked(unsure, own, picture, run, monkeypatch):
    flags = ("chat", "--model", unsure, "--backend", "torch", "--max-new-tokens", 4)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/guesses\n/image {picture}\n/guesses\n/memory\n"))
    status, out, err = run(*flags)
    lines = out.splitlines()
    assert status == 2  # of the first line alone
    assert "ask something before /guesses" in err
    assert lines[0] == "no idea"
    assert all(line.startswith("  ") and "(confidence 0." in line for line in lines[1:3])
    assert any(line.endswith("describe the image no idea") for line in lines[3:])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {picture}\n"))
    assert run(*flags, "--min-confidence", 0)[:2] == (0, f"{own.text}\n")


@pytest.mark.posix
def test_a_bundle_declines_like_its_checkpoint_on_every_backend(unsure: Path, tmp_path: Path):
    bundle = microvlm.export(unsure, tmp_path / "bundle")
    answers = {}
    for name, options in (("torch", {}), ("ort", {}), ("ort-arm64", {"target": "local"})):
        model = microvlm.load(bundle, backend=name, threads=1, **options)
        answers[name] = model.answer([PICTURE], "what is this?", options=OPTIONS, guesses=2)[0]
    assert answers["ort"] == answers["ort-arm64"]
    torch, ort = answers["torch"], answers["ort"]
    assert (torch.tokens, torch.declined, torch.text) == (ort.tokens, ort.declined, ort.text)
    assert torch.confidence == pytest.approx(ort.confidence, abs=0.02)
