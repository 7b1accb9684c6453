"""`microvlm assemble`: a checkpoint that the other commands take, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hf_models import altered
from PIL import Image
from test_hf_checkpoint import save_tokenizer

from microvlm.commands.main import cli
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters.bundle_writer import export
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.checkpoint import load_checkpoint


@pytest.fixture
def parts(hf_folders, tmp_path) -> list[str]:
    """The options of two small parts."""
    folder = altered(hf_folders[0] / "qwen2", tmp_path / "qwen2")
    save_tokenizer(folder)
    return ["--vision", str(hf_folders[0] / "vit"), "--decoder", str(folder)]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    return str(caught.value)


def test_an_assembled_checkpoint_is_described_and_answers(parts, tmp_path):
    document = json.loads(run("assemble", *parts, "-o", tmp_path / "start", "--json"))
    assert document["parts"]["decoder"]["parameters"] + document["parts"]["embedding"]["parameters"] == sum(
        p.numel()
        for n, p in load_checkpoint(tmp_path / "start").named_parameters()
        if n.startswith(("dec", "emb"))
    )
    assert document["next"].startswith(f"microvlm-train stage1 --start {tmp_path / 'start'}")
    described = json.loads(run("info", tmp_path / "start", "--json"))
    assert described["parts"]["total"] == document["parts"]["total"] | {
        "bits_per_weight": described["parts"]["total"]["bits_per_weight"]
    }
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    answer = run(
        "caption", tmp_path / "red.png", "--model", tmp_path / "start", "--max-new-tokens", 2, "--json"
    )
    assert len(json.loads(answer)["tokens"]) <= 2


def test_the_options_are_in_the_configuration(parts, tmp_path):
    text = run(
        "assemble", *parts, "-o", tmp_path / "start", "--memory-slots", 7, "--prefix-tokens", 5,
        "--prompt-template", r"Q: {prompt}\nA:",
    )  # fmt: skip
    config = MicroVLMConfig.load(tmp_path / "start")
    assert (config.memory.slots, config.memory.code_size, config.prefix_tokens) == (7, 64, 5)
    assert config.prompt.template == "Q: <image>{prompt}\nA:"
    assert config.name == "qwen2"
    assert r"prompt: Q: <image>{prompt}\nA:" in text


def test_bad_options_are_sentences_and_leave_nothing(parts, tmp_path):
    target = tmp_path / "start"
    assert "'slots' must be fewer than 'code_size'" in refused(
        "assemble", *parts, "-o", target, "--memory-slots", 64
    )
    assert "must have {prompt} once" in refused(
        "assemble", *parts, "-o", target, "--prompt-template", "hello"
    )
    assert not target.exists()
    (target / "deeper").mkdir(parents=True)
    (target / "config.json").write_text("{}")
    assert "not a MicroVLM" in refused("assemble", *parts, "-o", target)
    assert (target / "config.json").read_text() == "{}"


def test_a_checkpoint_is_assembled_anew_in_its_place(parts, tmp_path):
    run("assemble", *parts, "-o", tmp_path / "start")
    before = (tmp_path / "start" / "model.safetensors").read_bytes()
    run("assemble", *parts, "-o", tmp_path / "start")
    assert (tmp_path / "start" / "model.safetensors").read_bytes() == before
    run("assemble", *parts, "-o", tmp_path / "start", "--seed", 1)
    assert (tmp_path / "start" / "model.safetensors").read_bytes() != before


@pytest.mark.export
def test_an_export_keeps_the_tokenizer_and_its_chat_template(parts, tmp_path):
    run("assemble", *parts, "-o", tmp_path / "start")
    export(tmp_path / "start", tmp_path / "bundle", WeightFormat(8), threads=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (tmp_path / "start" / name).read_bytes()
    assert "chat_template" in json.loads((tmp_path / "bundle" / "tokenizer_config.json").read_text())


def test_a_hub_ids_pickled_weights_are_fetched_where_there_are_no_others(tmp_path, monkeypatch):
    import huggingface_hub

    from microvlm.sources import hub

    asked = []

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.part_snapshot("owner/name") == Path(tmp_path)
    assert [any("bin" in pattern for pattern in patterns) for patterns in asked] == [
        False,
        False,
        False,
        True,
    ]
    asked.clear()
    (tmp_path / "model.safetensors").touch()
    hub.part_snapshot("owner/name")
    assert not any("bin" in pattern for patterns in asked for pattern in patterns)
