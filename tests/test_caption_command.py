"""`microvlm caption`: its JSON, its heatmap, and one sentence with status 2 for every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.loaded_model import default_backend

SAID = {"caption", "tokens", "confidence", "declined", "guesses", "timings_ms", "memory"}
"""Keys of an answer in JSON."""


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def run(capsys):
    """Arguments -> (status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            run_click(cli, arguments)
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return call


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_json_of_one_image_is_caption_tokens_and_timings(backend, run, picture, speaking_bundle):
    status, out, _ = run(
        "caption",
        picture,
        "--model",
        str(speaking_bundle),
        "--backend",
        backend,
        "--max-new-tokens",
        "4",
        "--json",
    )
    document = json.loads(out)
    assert status == 0
    assert set(document) == SAID
    assert isinstance(document["caption"], str)
    assert len(document["tokens"]) <= 4
    assert all(isinstance(token, int) for token in document["tokens"])
    assert {"load", "preprocess", "vision", "embed", "prefill", "decode", "total"} <= set(
        document["timings_ms"]
    )
    assert all(value >= 0 for value in document["timings_ms"].values())


def test_json_of_several_images_is_one_document(run, picture, speaking_bundle):
    status, out, _ = run("caption", picture, picture, "--model", str(speaking_bundle), "--json")
    results = json.loads(out)["results"]
    assert status == 0
    assert [set(result) for result in results] == [{"image", *SAID}] * 2
    assert results[0]["tokens"] == results[1]["tokens"]


def test_the_prompt_and_the_seed_reach_the_model(run, picture, speaking_checkpoint):
    def tokens(*extra: str) -> list[int]:
        status, out, _ = run("caption", picture, "--model", str(speaking_checkpoint), "--json", *extra)
        assert status == 0
        return json.loads(out)["tokens"]

    assert tokens("--temperature", "2", "--seed", "1") == tokens("--temperature", "2", "--seed", "1")
    assert tokens("--temperature", "2", "--seed", "1") != tokens("--temperature", "2", "--seed", "2")
    assert tokens("--prompt", "what is this?") == tokens("--prompt", "what is this?", "--backend", "torch")


def test_the_heatmap_has_a_panel_for_the_picture_and_each_word(run, picture, speaking_checkpoint, tmp_path):
    from microvlm.commands.heatmap import PANEL_PX

    target = tmp_path / "heat.png"
    status, _, _ = run(
        "caption",
        picture,
        "--model",
        str(speaking_checkpoint),
        "--attention",
        str(target),
        "--max-new-tokens",
        "5",
    )
    assert status == 0
    with Image.open(target) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width >= PANEL_PX
        assert sheet.height >= PANEL_PX
    assert sorted(os.listdir(tmp_path)) == ["cat.png", "heat.png"]


def test_a_heatmap_that_cannot_be_made_is_refused_before_the_model_loads(
    run, picture, speaking_bundle, tmp_path
):
    model = ("--model", str(speaking_bundle))
    assert_refused(
        run("caption", picture, *model, "--attention", str(tmp_path / "a.png"), "--backend", "ort"),
        "--backend torch",
        "--evidence",
    )
    assert_refused(run("caption", picture, *model, "--attention", "heat.txt"), ".png")
    assert_refused(
        run("caption", picture, *model, "--evidence", "heat.txt"), "--evidence heat.txt is not a .png"
    )
    same = str(tmp_path / "a.png")
    assert_refused(run("caption", picture, *model, "--attention", same, "--evidence", same), "two names")
    with open(picture, "rb") as file:
        before = file.read()
    assert_refused(
        run("caption", picture, *model, "--attention", picture), "would replace the picture itself"
    )
    with open(picture, "rb") as file:
        assert file.read() == before
    assert_refused(run("caption", picture, *model, "--attention", str(tmp_path / "none" / "a.png")), "folder")
    assert_refused(
        run("caption", picture, picture, *model, "--attention", str(tmp_path / "a.png")), "one image"
    )


def test_each_bad_input_is_one_sentence_and_status_2(run, picture, speaking_bundle, tmp_path):
    model = ("--model", str(speaking_bundle))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut_image = tmp_path / "cut.jpg"
    Image.effect_noise((300, 300), 90).save(cut_image)
    cut_image.write_bytes(cut_image.read_bytes()[:3000])
    assert_refused(run("caption", *model), "IMAGE")
    assert_refused(run("caption", str(tmp_path / "none.png"), *model), "does not exist")
    assert_refused(run("caption", str(text), *model), "not a picture")
    assert_refused(run("caption", str(cut_image), *model), "damaged")
    assert_refused(run("caption", str(tmp_path), *model), "folder")
    assert_refused(run("caption", picture, *model, "--backend", "tpu"), "unknown backend 'tpu'")
    assert_refused(run("caption", picture, "--model", str(tmp_path)), "neither a bundle")
    assert_refused(run("caption", picture, "--model", "no-such-model"), "no-such-model")
    assert_refused(run("caption", picture, *model, "--max-new-tokens", "0"), "--max-new-tokens")
    assert_refused(run("caption", picture, *model, "--max-new-tokens", "100000"), "--max-new-tokens")
    assert_refused(run("caption", picture, *model, "--top-p", "2"), "--top-p")
    assert_refused(run("caption", picture, *model, "--threads", "0"), "--threads")
    assert_refused(run("caption", picture, *model, "--memory", str(tmp_path / "none.mem")), "none.mem")
    assert_refused(run("caption", picture, *model, "--prompt", "a <image>"), "<image>")
    assert_refused(run("captoin", picture), "captoin")


@pytest.mark.linux
def test_a_full_disk_is_one_sentence(speaking_bundle, picture):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                "from microvlm.commands.main import main; main()",
                "caption",
                picture,
                "--model",
                speaking_bundle,
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == 2
    assert "no space is left" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_bundle_runs_on_ort_and_a_checkpoint_on_torch(speaking_bundle, speaking_checkpoint):
    assert default_backend(str(speaking_bundle)) == "ort"
    assert default_backend(str(speaking_checkpoint)) == "torch"


def test_one_bad_picture_of_several_does_not_keep_the_others_from_being_described(
    run, picture, speaking_bundle, tmp_path
):
    bad = tmp_path / "text.png"
    bad.write_text("no picture")
    images = [str(tmp_path / "none.png"), picture, str(bad), picture]
    arguments = ["caption", *images, "--model", str(speaking_bundle), "--max-new-tokens", "2"]
    status, out, err = run(*arguments)
    assert status == 2
    assert out.count(f"{picture}: ") == 2
    assert err.count("Error: ") == 2
    status, out, err = run(*arguments, "--json")
    assert status == 2
    results = json.loads(out)["results"]
    assert [result["image"] for result in results] == images
    assert ["caption" in result for result in results] == [False, True, False, True]
    assert "does not exist" in results[0]["error"]
    assert "not a picture" in results[2]["error"]


def test_pictures_that_are_all_bad_are_refused_before_the_model_loads(run, tmp_path):
    images = [str(tmp_path / name) for name in ("a.png", "b.png")]
    status, out, err = run("caption", *images, "--model", "no-such-model")
    assert (status, out, err.count("does not exist")) == (2, "", 2)
