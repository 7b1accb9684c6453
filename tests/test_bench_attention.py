"""`microvlm-bench attention`: its document, tables, heatmaps and drift on real models, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import FLOAT, TERNARY, seeded_model, tiny_config
from PIL import Image

from microvlm import MicroVLM
from microvlm.backends import load
from microvlm.bench import report
from microvlm.bench.attention.attention_bench import Options
from microvlm.bench.attention.attention_maps import read_model
from microvlm.bench.attention.attention_records import WordMap
from microvlm.bench.attention.epps_pulley import swap_test
from microvlm.bench.bench_command import command
from microvlm.bench.equivalence.samples import choose
from microvlm.bench.evalset_reader import load_evalset
from microvlm.commands.heatmap import WORDS
from microvlm.commands.main import cli
from microvlm.config import MicroVLMConfig
from microvlm.console import run_click
from microvlm.inputs.processor import Processor
from microvlm.sources.model_source import DEFAULT_MODEL

LAYER = 2
"""Of nano, the layer whose queries are changed."""
IMAGES = 12


def status_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_info:
        run_click(command, ["attention", *map(str, arguments)])
    return exit_info.value.code


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory) -> Path:
    """nano with sharper queries in one layer."""
    model = MicroVLM.from_pretrained("nano")
    model.decoder.layers[LAYER].self_attn.q_proj.scale.mul_(1.5)
    folder = tmp_path_factory.mktemp("models") / "nano-sharp"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(perturbed, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("attention")
    file, plots = folder / "attention.json", folder / "plots"
    flags = ["--against", perturbed, "--images", IMAGES, "--plots", plots, "-o", file]
    assert status_of("nano", *flags) == 0
    return json.loads(file.read_text()), plots


def test_the_document_has_every_layer_and_head_of_a_real_model(measured):
    document, _ = measured
    side = document["model"]
    assert (document["report"], side["model"], side["decoder_bits"]) == ("attention", "nano", 1.58)
    assert (document["pictures"], document["prefix_tokens"]) == (IMAGES, 18)
    assert document["provenance"]["model"]["name"] == "nano"
    assert document["provenance"]["against"]["name"] == "nano-sharp"
    heads = [head for layer in side["layers"] for head in layer["heads"]]
    assert (len(side["layers"]), len(heads)) == (4, 12)
    for head in heads:
        assert 0 < head["entropy"] < np.log(18)
        assert head["relative_entropy"] == pytest.approx(head["entropy"] / np.log(18))
        assert 0 < head["max"] < head["mean"] < 1
        assert 0 <= head["sparsity"] < 1
        assert head["mean"] + head["text"] == pytest.approx(1)
        assert 0 < head["slot"] < 1


def test_the_codes_of_a_real_model_are_judged_beside_their_null(measured):
    rows = measured[0]["model"]["isotropy"]
    assert [row["samples"] for row in rows] == [IMAGES] * 2
    for row in rows:
        # One question about every picture: its latents have a common direction.
        assert row["p_value"] == 0.001
        assert row["null_mean"] == pytest.approx(1.05, abs=0.02)
        assert row["null_mean"] < row["null_95"] < row["null_99"] < row["statistic"]
        assert row["mean_length"] > 0.5
        assert 1 < row["effective_rank"] < IMAGES


def test_examples_are_those_of_equivalence_with_the_maps_that_caption_draws(measured, tmp_path):
    document, _ = measured
    kept = choose(load_evalset(), load("torch", "nano", 1).config, IMAGES, 0)
    examples = document["examples"]
    assert [(each["picture"], each["right"]) for each in examples] == [
        (sample.name, sample.answer) for sample in kept
    ]
    drawn = tmp_path / "drawn.png"
    arguments = [
        "caption",
        str(kept[0].images[0]),
        "--model",
        "nano",
        "--prompt",
        document["prompt"],
        "--attention",
        str(drawn),
    ]
    assert not cli.main(arguments, standalone_mode=False)
    words = [f"{word['word']}: {word['note']}" for word in examples[0]["maps"]]
    assert Image.open(drawn).text[WORDS].splitlines() == [examples[0]["answer"], *words]
    for word in (word for each in examples for word in each["maps"]):
        assert np.array(word["weights"]).shape == (8, 8)
        here = int(word["note"].partition("%")[0])
        # Five decimals a place, and the note in whole percent.
        assert np.sum(word["weights"]) == pytest.approx(here / 100, abs=0.006)


def test_pictures_of_a_folder_are_no_examples_and_none_may_be_asked_for(tmp_path):
    folder = Path(__file__).parent.parent / "bench" / "photographs"
    for number, flags in enumerate((["--pictures", folder], ["--examples", 0])):
        file = tmp_path / f"{number}.json"
        assert status_of("nano", "--images", 2, *flags, "-o", file) == 0
        document = json.loads(file.read_text())
        assert document["examples"] == []
        assert "examples" not in [table.name for table in report.read_report(document).tables]


def test_the_place_of_a_map_is_said_in_words():
    def place(*rows: list[float]) -> str:
        return WordMap("a", "", list(rows)).place

    assert place([0, 0, 0], [0, 0.5, 0], [0, 0, 0]) == "the middle"
    assert place([0.1, 0, 0], [0, 0.05, 0], [0, 0, 0]) == "the top left"
    assert place([0, 0, 0], [0, 0, 0], [0, 0.2, 0.1]) == "the bottom"
    assert place([0, 0, 0, 0], [0, 0, 0, 0.3], [0, 0, 0, 0], [0, 0, 0, 0]) == "the right"
    assert place([0, 0], [0, 0]) == "nowhere"


def test_changed_queries_are_found_in_their_layer_and_not_before_it(measured):
    comparison = measured[0]["comparison"]
    p_values = [layer["p_holm"] for layer in comparison["layers"]]
    assert comparison["test"]["p_value"] < 0.01
    assert p_values[:LAYER] == [1.0] * LAYER
    assert p_values[LAYER] < 0.01
    divergences = [layer["divergence"] for layer in comparison["layers"]]
    assert divergences[:LAYER] == pytest.approx([0] * LAYER, abs=1e-9)
    assert np.argmax(divergences) == LAYER


def test_the_tables_are_rendered_from_the_document(measured, capsys, tmp_path):
    document, _ = measured
    shown = report.read_report(document)
    assert [table.name for table in shown.tables] == [
        "layers",
        "heads",
        "isotropy",
        "null",
        "examples",
        "drift",
    ]
    assert len(shown.tables[0].rows) == 5
    assert [row[1] for row in shown.tables[2].rows[1:]] == ["nano", "nano", "nano-sharp", "nano-sharp"]
    assert "attention drifted (p 0.0" in shown.text()
    file = tmp_path / "a.json"
    file.write_text(json.dumps(document))
    command.main(["report", str(file)], standalone_mode=False)
    assert shown.markdown() in capsys.readouterr().out


def test_heatmaps_of_text_tokens_and_prefix_embeddings_are_drawn_for_each_layer(measured):
    _, plots = measured
    names = sorted(path.name for path in plots.iterdir())
    assert names == sorted(
        f"layer-{layer:02d}{kind}.png" for layer in range(4) for kind in ("", "-against", "-difference")
    )
    first, second = (
        np.asarray(Image.open(plots / f"layer-{layer:02d}-difference.png")) for layer in (0, LAYER)
    )
    # Colours appear where the two differ.
    assert (
        np.ptp(first[40:-40, 200:400].astype(int), axis=2).max()
        < np.ptp(second[40:-40, 200:400].astype(int), axis=2).max()
    )


def test_a_checkpoint_and_the_bundle_made_of_it_have_the_same_attention(
    speaking_checkpoint, speaking_bundle, tmp_path
):
    file = tmp_path / "same.json"
    flags = ["--against", speaking_bundle, "--images", IMAGES, "-o", file]
    assert status_of(speaking_checkpoint, *flags) == 0
    comparison = json.loads(file.read_text())["comparison"]
    assert comparison["test"] == {
        "statistic": 0.0,
        "null_mean": 0.0,
        "p_value": 1.0,
        "p_interval": comparison["test"]["p_interval"],
    }
    assert "no drift was found" in report.text(json.loads(file.read_text()))


def test_another_precision_of_one_checkpoint_is_found(tmp_path, tiny_processor, capsys):
    for name, quantization in (("float", FLOAT), ("ternary", TERNARY)):
        config = tiny_config(quantization)
        model = seeded_model(config)
        if name == "ternary":
            model.load_state_dict(seeded_model(tiny_config(FLOAT)).state_dict())
        model.save_pretrained(tmp_path / name)
        Processor(tiny_processor.tokenizer, config).save(tmp_path / name)
    flags = ["--against", tmp_path / "ternary", "--images", 20, "--json"]
    assert status_of(tmp_path / "float", *flags) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["model"]["decoder_bits"], document["comparison"]["against"]["decoder_bits"]) == (
        32,
        1.58,
    )
    assert document["comparison"]["test"]["p_value"] < 0.01


def test_attention_of_a_real_model_to_swapped_views_gives_even_p_values():
    """Each picture has two views; which of them is whose is drawn, so 1,000 p-values must be even."""
    runtime = load("torch", "nano", 1)
    processor = Processor.from_pretrained(runtime.directory)
    evalset = load_evalset()
    files = [evalset.path(image.file) for image in evalset.images[:48]]
    model = read_model(runtime, processor, files, "describe the image")
    maps = model.prefix[1].reshape(48, -1)
    first, second = maps[:24], maps[24:]
    generator = np.random.default_rng(0)
    p_values = []
    for _ in range(1000):
        swap = generator.random((24, 1)) < 0.5
        pair = np.where(swap, first, second), np.where(swap, second, first)
        p_values.append(swap_test([pair], slices=16, swaps=199)[0].p_value)
    for level in (0.05, 0.5, 0.95):
        rejected = (np.array(p_values) <= level).mean()
        assert rejected == pytest.approx(level, abs=3.29 * (level * (1 - level) / 1000) ** 0.5)


def test_pictures_and_question_can_be_ones_own(speaking_checkpoint, tmp_path, capsys):
    folder = tmp_path / "mine" / "deeper"
    folder.mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (40, 30 + number), colour).save(folder / f"{colour}.png")
    (folder / "notes.txt").write_text("no picture")
    flags = ["--pictures", tmp_path / "mine", "--images", 4, "--prompt", "which colour is it?", "--json"]
    assert status_of(speaking_checkpoint, *flags) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["pictures"], document["source"]) == (4, "mine")
    assert document["prompt"] == "which colour is it?"
    assert "comparison" not in document


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--backend", "ort"], "--backend ort gives no attention weights; use --backend torch"),
        (["--images", "1"], "--images is 1; give 2 or more."),
        (
            ["--images", "5", "--against", "nano"],
            "--images is 5; give 6 or more: --against cannot find a drift",
        ),
        (["--pictures", "nowhere"], "nowhere is no folder; give one with pictures."),
        (["--pictures", "empty"], r"empty has 0 pictures \(.jpg, .*\); give 2 or more."),
        (["--pictures", "damaged"], "damaged/b.png"),
        (["--prompt", "<image>"], "leave '<image>' out of the text"),
        (["--against", "nanoo"], "there is no model 'nanoo'"),
        (["--against", "photo", "--images", "6"], "different shapes, 4 x 3 x 18 and 4 x 4 x 21"),
        (["-o", "nowhere/a.json"], "its folder does not exist"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("damaged").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (9, 9)).save(f"damaged/{name}.png")
    Path("damaged/b.png").write_bytes(b"no picture")
    assert status_of("nano", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert re.search(sentence, errors[0])
    assert "Traceback" not in captured.err


def test_models_with_other_tokens_and_with_broken_weights_are_refused(speaking_checkpoint, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(speaking_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    config["prompt"]["template"] = "look: " + config["prompt"]["template"]
    (other / "config.json").write_text(json.dumps(config))
    MicroVLMConfig.load(other)
    assert status_of(speaking_checkpoint, "--against", other, "--images", 6) == 2
    assert "read the prompt as different tokens" in capsys.readouterr().err
    model = MicroVLM.from_pretrained(speaking_checkpoint)
    model.decoder.layers[0].input_layernorm.weight.data.fill_(float("inf"))
    model.save_pretrained(tmp_path / "broken")
    assert status_of(tmp_path / "broken", "--images", 4) == 2
    assert "Error: " in capsys.readouterr().err


def test_the_default_model_is_that_of_every_command():
    assert Options().model == DEFAULT_MODEL
