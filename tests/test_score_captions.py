"""`microvlm-score` on data folders of anyone's pictures: what is scored, against what, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_sources import build, write_lines, write_pictures
from PIL import Image
from torch.nn import functional as F

from microvlm.bench.evalset_reader import load_evalset
from microvlm.console import run_click
from microvlm.loaded_model import LoadedModel, load
from microvlm.training.batches.conversation_rows import ConversationRows, Exchange
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.data.caption_data import open_data
from microvlm.training.scoring import token_scores
from microvlm.training.scoring.answer_scores import answer_questions, fitting
from microvlm.training.scoring.contact_sheet import PICTURES, chosen_pictures
from microvlm.training.scoring.held_out import Picture, Question, read_held_out
from microvlm.training.scoring.score_command import command
from microvlm.training.scoring.token_scores import count_tokens, score_tokens, tokenize


def score(*arguments: object) -> tuple[int, str, str]:
    """Run `microvlm-score` in this process -> exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
        run_click(command, [str(argument) for argument in arguments])
    return int(exit_info.value.code or 0), out.getvalue(), err.getvalue()


def refuse(*arguments: object) -> str:
    status, stdout, stderr = score(*arguments)
    assert (status, stdout) == (2, "")
    assert "Traceback" not in stderr
    return stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def mixed_data(tmp_path_factory) -> Path:
    """Fourteen pictures with two captions, a question that has two answers, and six episodes of two pictures."""
    root = tmp_path_factory.mktemp("mixed")
    names = [f"pictures/{name}" for name in write_pictures(root / "pictures", 26)]
    rows = [
        {
            "image": name,
            "turns": [
                {"answer": f"picture {number}"},
                {"answer": f"a picture of {number % 3}"},
                {"question": "What colour is it?", "answer": "red"},
                {"question": "What colour is it?", "answer": "blue"},
            ],
        }
        for number, name in enumerate(names[:14])
    ]
    for number in range(14, 26, 2):
        turns = [{"answer": f"thing {n}", "images": [n]} for n in range(2)]
        turns.append({"question": "what was in the first image?", "answer": "thing 0", "images": []})
        rows.append({"images": names[number : number + 2], "turns": turns})
    write_lines(root / "captions.jsonl", rows)
    build(root / "captions.jsonl", "-o", root / "data", "--validation", "0.1", "--test", "0.7")
    return root / "data"


@pytest.fixture(scope="module")
def emoji_drawings(tmp_path_factory) -> Path:
    """Drawings that nano knows, in a data folder whose test split has most of them."""
    root = tmp_path_factory.mktemp("drawings")
    evalset = load_evalset()
    rows = []
    for image in evalset.images[:40]:
        shutil.copy(evalset.path(image.file), root / Path(image.file).name)
        rows.append({"image": Path(image.file).name, "caption": image.caption})
    write_lines(root / "captions.jsonl", rows)
    build(root / "captions.jsonl", "-o", root / "data", "--test", "0.6")
    return root / "data"


@pytest.fixture(scope="module")
def loaded(speaking_checkpoint) -> LoadedModel:
    return load(speaking_checkpoint, "torch")


def test_a_split_becomes_pictures_with_all_captions_questions_with_all_answers_and_episodes(mixed_data):
    held_out = read_held_out(open_data(mixed_data), "test")
    assert held_out.samples == held_out.available == open_data(mixed_data).count("test")
    episodes = held_out.episodes
    assert episodes
    assert all(len(episode.images) == 2 for episode in episodes)
    assert {episode.questions[0].text for episode in episodes} == {"what was in the first image?"}
    singles = [picture for picture in held_out.pictures if len(picture.captions) == 2]
    assert len(singles) == held_out.samples - len(episodes) == len(held_out.questions)
    assert {question.answers for question in held_out.questions} == {("red", "blue")}
    assert {len(p.captions) for p in held_out.pictures} == {1, 2}


def test_the_same_samples_are_scored_whatever_the_count(mixed_data):
    data = open_data(mixed_data)
    few, all_of_it = read_held_out(data, "test", 3), read_held_out(data, "test")
    assert few.samples == 3
    assert few.pictures == all_of_it.pictures[: len(few.pictures)]


def test_the_report_has_every_score_and_the_answers_are_those_that_users_get(
    mixed_data, speaking_checkpoint, loaded, tmp_path
):
    text = tmp_path / "text.txt"
    text.write_text("a red heart and a dog on the beach. " * 60)
    files = ["-o", tmp_path / "s.json", "--markdown", tmp_path / "s.md", "--pictures", tmp_path / "sheet"]
    status, stdout, stderr = score(
        speaking_checkpoint, "--data", mixed_data, "--text", text, "--against", "nano", *files
    )
    assert status == 0, stderr
    document = json.loads((tmp_path / "s.json").read_text())
    held_out = read_held_out(open_data(mixed_data), "test")
    assert document["captions"]["pictures"] == len(held_out.pictures)
    assert document["questions"]["kinds"][0]["kind"] == "what colour"
    assert document["questions"]["kinds"][0]["commonest"] == 1.0
    assert [row["kind"] for row in document["episodes"]] == ["asked in the data", "by place"]
    assert set(document["tokens"]["rows"]) == {"model", "shuffled", "unigram"}
    assert document["text"]["perplexity"] > 1
    by_key = {picture.key: picture for picture in held_out.pictures}
    for example in document["examples"]:
        picture = by_key[example["key"]]
        assert example["model"] == loaded.generate(picture.image)
        assert example["captions"] == list(picture.captions)
    differences = document["against"]["differences"]
    assert differences["word_f1"]["low"] <= differences["word_f1"]["value"] <= differences["word_f1"]["high"]
    # nano cuts captions into other tokens.
    assert "loss" not in differences
    for part in ("what colour", "CIDEr-D", "pictures shuffled", "with the memory", "paired by picture"):
        assert part in stdout
    assert "### captions against all that people wrote" in (tmp_path / "s.md").read_text()
    with Image.open(tmp_path / "sheet" / "captions.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 5 * 224


def test_a_model_compared_with_itself_has_no_difference(mixed_data, speaking_checkpoint):
    status, stdout, stderr = score(
        speaking_checkpoint,
        "--data",
        mixed_data,
        "--against",
        speaking_checkpoint,
        "--no-baselines",
        "--count",
        4,
        "--json",
    )
    assert status == 0, stderr
    document = json.loads(stdout)
    assert set(document["tokens"]["rows"]) == {"model"}
    assert "loss" in document["against"]["differences"]
    assert {tuple(d.values()) for d in document["against"]["differences"].values()} == {(0.0, 0.0, 0.0)}


def test_the_caption_loss_is_the_cross_entropy_of_the_model(mixed_data, loaded, monkeypatch):
    monkeypatch.setattr(token_scores, "PICTURES", 4)
    pictures = read_held_out(open_data(mixed_data), "test").pictures[:9]  # 4 and 5: none is left alone
    done: list[int] = []
    scores = score_tokens(loaded, pictures, tokenize(loaded, pictures), True, done.append)
    assert done == [4, 9]
    for number, shown in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 8]):
        assert scores.model[number] == pytest.approx(cross_entropy(loaded, pictures, number, shown), rel=1e-4)
    assert scores.shuffled is not None
    for number, shown in enumerate([3, 0, 1, 2, 8, 4, 5, 6, 7]):
        expected = cross_entropy(loaded, pictures, number, shown)
        assert scores.shuffled[number] == pytest.approx(expected, rel=1e-4)


def cross_entropy(loaded: LoadedModel, pictures: list[Picture], number: int, shown: int) -> list[float]:
    """(nats, tokens, right tokens) of a picture's captions by PyTorch, while picture `shown` is in view."""
    model, processor = loaded.runtime.model, loaded.processor
    captions = pictures[number].captions
    prompt = loaded.config.prompt.caption_prompt
    rows = ConversationRows(processor).build([Exchange(prompt, caption, 1) for caption in captions])
    pixels = np.stack([processor.pixels(pictures[shown].image)] * len(captions))
    with torch.no_grad():
        embeds = model.place_images(
            rows.ids, processor.image_id, model.encode_image(torch.from_numpy(pixels))
        )
        logits = model(embeds, rows.mask, logits_mask=rows.labels != IGNORED)
    target = rows.labels[rows.labels != IGNORED]
    right = int((logits.argmax(-1) == target).sum())
    return [float(F.cross_entropy(logits, target, reduction="sum")), len(target), right]


def test_the_loss_does_not_depend_on_how_many_logits_are_held(mixed_data, loaded, monkeypatch):
    pictures = read_held_out(open_data(mixed_data), "test").pictures[:4]
    captions = tokenize(loaded, pictures)
    together = score_tokens(loaded, pictures, captions, False, lambda _: None)
    monkeypatch.setattr(token_scores, "MOST_LOGITS", 1)
    one_by_one = score_tokens(loaded, pictures, captions, False, lambda _: None)
    np.testing.assert_allclose(together.model, one_by_one.model, rtol=1e-5)
    assert one_by_one.shuffled is None


def test_the_loss_of_a_bundle_is_that_of_its_checkpoint(mixed_data, loaded, speaking_bundle):
    pictures = read_held_out(open_data(mixed_data), "test").pictures[:4]
    captions = tokenize(loaded, pictures)
    torch_scores, ort_scores = (
        score_tokens(model, pictures, captions, True, lambda _: None)
        for model in (loaded, load(speaking_bundle, "ort"))
    )
    np.testing.assert_allclose(torch_scores.model[:, 0], ort_scores.model[:, 0], rtol=1e-3)
    assert torch_scores.model[:, 1].tolist() == ort_scores.model[:, 1].tolist()


def test_the_unigram_baseline_counts_the_tokens_of_training_captions(mixed_data, loaded):
    data = open_data(mixed_data)
    captions = [turn.answer for turns in data.turns("train") for turn in turns if turn.question is None]
    tokens = [t for text in captions for t in [*loaded.processor.text_ids(text), loaded.processor.eos_id]]
    unigram = count_tokens(loaded, data)
    probabilities = np.exp(-unigram.nats)
    assert probabilities.sum() == pytest.approx(1)
    different = len(set(tokens))
    token = tokens[0]
    assert probabilities[token] == pytest.approx(tokens.count(token) / (len(tokens) + different))
    unseen = [number for number in range(len(probabilities)) if number not in tokens]
    assert probabilities[unseen].sum() == pytest.approx(different / (len(tokens) + different))
    pictures = read_held_out(data, "train").pictures
    (nats, count, right), *_ = unigram.scores(tokenize(loaded, pictures))
    assert 0 < nats < count * np.log(len(probabilities))
    assert 0 <= right <= count


def test_a_question_that_does_not_fit_the_model_is_left_out(loaded):
    evalset = load_evalset()
    picture = evalset.path(evalset.images[0].file).read_bytes()
    short = Question("a", "what is this?", (picture,), ("heart",))
    long_text = Question("b", "what " * 300, (picture,), ("heart",))
    many = Question("c", "what is this?", (picture,) * 64, ("heart",))
    assert fitting(loaded, [long_text, short, many]) == [short]
    assert len(answer_questions(loaded, [short], lambda _: None)) == 1


def test_pictures_of_a_sheet_are_chosen_by_their_names_alone():
    pictures = [Picture(f"{number}", b"", ("a",)) for number in range(60)]
    chosen = [pictures[number].key for number in chosen_pictures(pictures)]
    assert len(chosen) == PICTURES
    again = [pictures[::-1][number].key for number in chosen_pictures(pictures[::-1])]
    assert chosen == again


def test_nano_captions_drawings_that_it_knows_and_needs_its_memory_for_earlier_ones(emoji_drawings):
    """A trained model: the scores must tell knowledge from chance."""
    status, stdout, stderr = score("nano", "--data", emoji_drawings, "--json")
    assert status == 0, stderr
    document = json.loads(stdout)
    captions, tokens = document["captions"], document["tokens"]
    assert captions["exact_match"]["value"] > 0.5
    assert captions["cider_d"]["value"] > 2
    rows = tokens["rows"]
    assert rows["model"]["loss"]["value"] < 1 < rows["unigram"]["loss"]["value"]
    assert rows["model"]["accuracy"]["value"] > 0.8 > rows["shuffled"]["accuracy"]["value"]
    assert tokens["picture_gain"]["low"] > 1
    (by_place,) = document["episodes"]
    assert by_place["memory"]["exact_match"]["value"] > 0.5
    assert by_place["empty"]["exact_match"]["value"] < 0.1


def test_an_emoji_folder_has_its_own_scores_by_default_and_caption_scores_where_they_are_asked_for(
    drawn_build, speaking_checkpoint
):
    folder, _ = drawn_build
    assert "--count is not for the scores of emoji: leave it out, or add --scores captions." in refuse(
        speaking_checkpoint, "--data", folder, "--count", 4
    )
    status, stdout, stderr = score(
        speaking_checkpoint, "--data", folder, "--scores", "captions", "--count", 4, "--json"
    )
    assert status == 0, stderr
    assert json.loads(stdout)["captions"]["pictures"] == 4


def test_refusals_are_one_sentence_with_the_next_step(
    mixed_data, speaking_checkpoint, tiny_checkpoint, hf_folders, tmp_path
):
    data = ("--data", mixed_data)
    assert "make it with microvlm-data images" in refuse("nano", "--data", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "is no data folder" in refuse("nano", "--data", tmp_path / "empty")
    assert "holds no emoji.json" in refuse("nano", *data, "--scores", "emoji")
    assert "is a decoder (qwen2) alone: assemble it first" in refuse(hf_folders[0] / "qwen2", *data)
    assert "tokenizer" in refuse(tiny_checkpoint, *data)
    assert "there is no model" in refuse("nano", *data, "--against", tmp_path / "no-model")
    assert "--text needs --backend torch" in refuse("nano", *data, "--backend", "ort", "--text", "a.txt")
    assert "there is no file" in refuse("nano", *data, "--text", tmp_path / "no.txt")
    assert "ends with .png" in refuse("nano", *data, "--pictures", tmp_path / "sheet.gif")
    assert "folder does not exist" in refuse("nano", *data, "--pictures", tmp_path / "no" / "sheet.png")
    assert "device 'cpux' is not available" in refuse(speaking_checkpoint, *data, "--device", "cpux")
    assert "has no option 'device'" in refuse("nano", *data, "--backend", "ort", "--device", "cpu")
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_a_folder_without_a_test_split_names_the_splits_that_it_has(tmp_path, speaking_checkpoint):
    names = write_pictures(tmp_path / "p", 3)
    write_lines(tmp_path / "p" / "captions.jsonl", [{"image": name, "caption": "a thing"} for name in names])
    build(tmp_path / "p" / "captions.jsonl", "-o", tmp_path / "data", "--test", "0", "--validation", "0")
    sentence = refuse(speaking_checkpoint, "--data", tmp_path / "data")
    assert "has no test samples (it has train 3): give another --split, or build it again" in sentence
    status, stdout, stderr = score(
        speaking_checkpoint, "--data", tmp_path / "data", "--split", "train", "--json"
    )
    assert status == 0, stderr
    assert json.loads(stdout)["data"]["split"] == "train"
