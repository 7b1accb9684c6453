"""`microvlm caption --attention` and `--evidence`: maps that show where an answer comes from, and flat ones as flat."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microvlm.bench.evalset_reader import EvalScene, load_evalset
from microvlm.commands import attention_reading, evidence
from microvlm.commands.heatmap import WORDS, Table, WordMap, draw, draw_table
from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.generation import GenerationOptions, embed_prompt, generate
from microvlm.loaded_model import LoadedModel, load

EVALSET = Path(__file__).parent.parent / "bench" / "evalset"
SIDE = 96
HALVES = {
    "left": np.s_[:, : SIDE // 2],
    "right": np.s_[:, SIDE // 2 :],
    "above": np.s_[: SIDE // 2],
    "below": np.s_[SIDE // 2 :],
}


@cache
def nano() -> LoadedModel:
    return load("nano", "torch")


@cache
def scenes() -> list[EvalScene]:
    """Scenes of two objects whose place is asked for."""
    everything = load_evalset(EVALSET).scenes
    return [scene for scene in everything if scene.kind == "what"][::20]


def object_share(weights: np.ndarray, file: Path, half: tuple) -> tuple[float, float]:
    """(share of a map's mass on the box of the object in a half of the picture, the box's share of the area)."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[half] = (np.abs(pixels - pixels[0, 0]).sum(-1) > 30)[half]
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    cell = SIDE // len(weights)
    spread = np.kron(weights, np.ones((cell, cell))) / cell**2
    box = spread[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return float(box.sum() / spread.sum()), box.size / spread.size


def ask(model: LoadedModel, picture: object, question: str) -> tuple:
    processor = model.processor
    inputs = processor([question], [[picture]])
    prompt = embed_prompt(model.runtime, *inputs, processor.image_id)
    options = GenerationOptions(max_new_tokens=8, stop_tokens=processor.stop_tokens)
    return inputs, prompt, generate(model.runtime, prompt, options).tokens[0]


def test_attention_lies_on_the_object_that_the_question_asks_for():
    shares, areas = [], []
    for scene in scenes():
        model, file = nano(), EVALSET / scene.file
        inputs, prompt, tokens = ask(model, file, scene.question)
        reading = attention_reading.read_attention(model.runtime, model.processor, inputs, prompt, tokens)
        half = HALVES[scene.question.rstrip("?").split()[-1]]
        share, area = object_share(reading.maps[0].weights, file, half)
        shares.append(share)
        areas.append(area)
    assert len(shares) == 8
    # Over all 160 scenes: .64 on an eighth of the area; .52 before a plain picture's attention was subtracted.
    assert np.mean(shares) > 0.55
    assert np.mean(areas) < 0.2


def test_evidence_lies_on_the_object_that_the_question_asks_for():
    shares = []
    for scene in scenes()[:2]:
        inputs, _, tokens = ask(nano(), EVALSET / scene.file, scene.question)
        (first, *_) = evidence.read_evidence(nano().runtime, nano().processor, inputs, tokens)
        half = HALVES[scene.question.rstrip("?").split()[-1]]
        shares.append(object_share(first.weights, EVALSET / scene.file, half)[0])
    assert np.mean(shares) > 0.55


def test_a_plain_picture_draws_no_attention_and_its_map_is_drawn_flat():
    plain = Image.new("RGB", (SIDE, SIDE), (200, 120, 40))
    inputs, prompt, tokens = ask(nano(), plain, "what is on the left?")
    reading = attention_reading.read_attention(nano().runtime, nano().processor, inputs, prompt, tokens)
    assert all(word.weights.sum() < 0.01 for word in reading.maps)
    sheet = np.asarray(draw(plain, reading.maps, "", 1 / 64, attention_reading.LEGEND))
    panel = sheet[8 : 8 + 224, 240 : 240 + 224].astype(int)
    assert np.ptp(panel.reshape(-1, 3), axis=0).max() < 12


def test_a_picture_in_one_corner_is_looked_at_there_and_not_in_empty_corners():
    """Attention rests on some corners whatever is seen: with one scale a map without subtraction glowed there."""
    corner = Image.new("RGB", (SIDE, SIDE), "white")
    drawing = Image.open(EVALSET / "images" / "1f355.png").convert("RGB").resize((40, 40))
    corner.paste(drawing, (52, 4))
    inputs, prompt, tokens = ask(nano(), corner, "what is above?")
    reading = attention_reading.read_attention(nano().runtime, nano().processor, inputs, prompt, tokens)
    weights = reading.maps[0].weights
    assert weights[:4, 4:].sum() > 0.6 * weights.sum()
    assert max(weights[0, 0], weights[-1, 0], weights[-1, -1]) < 0.3 * weights.max()


def test_the_table_has_a_row_for_each_token_and_a_column_for_each_prefix_embedding():
    inputs, prompt, tokens = ask(nano(), EVALSET / scenes()[0].file, "what is on the left?")
    table = attention_reading.read_attention(nano().runtime, nano().processor, inputs, prompt, tokens).table
    assert [label.strip() for label in table.labels[:5]] == ["what", "is", "on", "the", "left"]
    assert table.values.shape == (len(table.labels), nano().runtime.config.prefix_tokens)
    assert float(table.values.sum(1).max()) <= 1 + 1e-5
    assert len(table.labels) == 6 + len(tokens)


def test_hidden_parts_count_only_where_they_change_the_answer_the_same_on_every_backend(
    speaking_checkpoint, speaking_bundle
):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    maps = []
    for source, backend in (
        (speaking_checkpoint, "torch"),
        (speaking_bundle, "torch"),
        (speaking_bundle, "ort"),
    ):
        model = load(source, backend)
        inputs, _, _ = ask(model, picture, "what?")
        counts: list[tuple[int, int]] = []
        maps.append(
            evidence.read_evidence(
                model.runtime, model.processor, inputs, [5, 6], progress=lambda *at, c=counts: c.append(at)
            )
        )
        assert counts[-1][0] == counts[-1][1]
    for other in maps[1:]:
        assert [word.word for word in other] == [word.word for word in maps[0]]
        for mine, theirs in zip(maps[0], other, strict=True):
            assert mine.weights == pytest.approx(theirs.weights, abs=1e-3)


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_the_command_draws_evidence_on_every_backend(backend, speaking_bundle, tmp_path, capsys):
    picture, target = tmp_path / "p.png", tmp_path / "evidence.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(picture)
    with pytest.raises(SystemExit) as exit_info:
        run_click(
            cli,
            [
                *("caption", str(picture), "--model", str(speaking_bundle), "--backend", backend),
                *("--evidence", str(target), "--max-new-tokens", "4"),
            ],
        )
    assert exit_info.value.code == 0
    assert capsys.readouterr().err == ""
    with Image.open(target) as sheet:
        assert sheet.height > 224
        _, *words = sheet.text[WORDS].splitlines()
    assert words
    assert all(word.endswith(" without") for word in words)


def test_one_scale_serves_all_words_and_a_table_of_signed_numbers_has_its_own_colours():
    strong, weak = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    strong[2, 2], weak[5, 5] = 1.0, 0.05
    plain = Image.new("RGB", (SIDE, SIDE), "white")
    sheet = np.asarray(draw(plain, [WordMap("a", strong), WordMap("b", weak)], "c", 0.1, "legend")).astype(
        int
    )
    first, second = (sheet[8:232, 8 + 232 * n : 232 + 232 * n].sum(-1) for n in (1, 2))
    assert first.max() - first.min() > 5 * (second.max() - second.min())
    signed = draw_table(Table("t", ["x", "y"], np.array([[-1.0, 0.0], [0.5, 1.0]]), "columns"))
    assert signed.convert("RGB").getpixel((8 + 170 + 3, 28 + 3)) == (33, 102, 172)


def test_a_picture_that_is_stretched_for_the_model_is_drawn_in_its_own_shape_under_its_map():
    wide = Image.new("RGB", (200, 100), (200, 120, 40))
    weights = np.zeros((4, 4), np.float32)
    weights[:, 0] = 1.0
    sheet = draw(wide, [WordMap("left", weights)], "c", 0.1, "legend", stretch=True)
    picture, heat = (np.asarray(sheet).astype(int)[8:232, 8 + 232 * n : 232 + 232 * n] for n in (0, 1))
    for panel in (picture, heat):
        assert (panel[:56] == 255).all()
        assert (panel[168:] == 255).all()
        assert not (panel[56:168] == 255).all(-1).any()
    assert (picture[56:168] == (200, 120, 40)).all()
    brightness = heat[112].sum(-1)
    assert brightness[:40].mean() > 2 * brightness[-40:].mean()
