"""`microvlm info` of an encoder or a decoder to assemble: exact parameters, sizes, and the next step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import use_hub_cache
from safetensors.torch import load_file
from test_api import loaded_after
from test_assemble_sources import Q, pickled, write_gguf

from microvlm.commands.info import describe_model
from microvlm.commands.main import cli
from microvlm.commands.part_info import describe_part
from microvlm.errors import UserError
from microvlm.model.pretrained.parts import find_part, part_of

QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "tie_word_embeddings": True,
    "rope_theta": 1000000.0, "use_sliding_window": False,
}  # fmt: skip
DEIT = {
    "model_type": "vit", "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3,
    "intermediate_size": 768, "image_size": 224, "patch_size": 16,
}  # fmt: skip


def folder_of(path: Path, config: dict) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_qwen_and_deit_tiny_have_their_published_counts(tmp_path):
    qwen = describe_part(find_part(folder_of(tmp_path / "qwen2.5-0.5b", QWEN)))
    assert qwen["parameters"] == {
        "embedding": 136_134_656,
        "linears": 357_826_560,
        "biases_and_norms": 71_552,
        "total": 494_032_768,
    }
    assert qwen["embedding_bits"] == {"16": 16, "8": 8, "4": 4, "1.58": 8}
    deit = describe_part(find_part(folder_of(tmp_path / "deit-tiny", DEIT)))
    assert (deit["kind"], deit["parameters"]["total"]) == ("encoder", 5_524_416)
    assert deit["megabytes"]["1.58"] == deit["megabytes"]["8"]


@pytest.mark.parametrize("name", ["qwen2", "llama", "vit", "deit"])
def test_counts_are_those_of_the_files(hf_folders, name):
    root, _ = hf_folders
    document = describe_part(find_part(root / name))
    stored = load_file(root / name / "model.safetensors")
    counted = sum(value.numel() for key, value in stored.items() if not key.startswith("pooler."))
    assert document["parameters"]["total"] == counted
    assert document["stored"]["tensors"] == {"F32": len(stored)}
    assert document["stored"]["bytes"] == (root / name / "model.safetensors").stat().st_size


@pytest.mark.export
@pytest.mark.parametrize("width", [8, 1.58])
def test_the_predicted_size_is_that_of_an_exported_models_part(hf_folders, tmp_path, width):
    from hf_models import altered
    from test_hf_checkpoint import save_tokenizer

    from microvlm.exporters.bundle_writer import export
    from microvlm.formats.weight_format import WeightFormat

    root, _ = hf_folders
    decoder = altered(root / "qwen2", tmp_path / "qwen2")
    save_tokenizer(decoder)
    run("assemble", "--vision", root / "vit", "--decoder", decoder, "-o", tmp_path / "start")
    export(tmp_path / "start", tmp_path / "bundle", WeightFormat(width), threads=1)
    parts = describe_model(tmp_path / "bundle")["parts"]
    predicted = describe_part(find_part(decoder))["megabytes"][f"{width:g}"]
    assert predicted == pytest.approx((parts["decoder"]["bytes"] + parts["embedding"]["bytes"]) / 1e6)


def test_a_gguf_file_is_described_from_its_header(hf_folders, tmp_path):
    write_gguf(hf_folders[0] / "llama", tmp_path / "small.gguf", {"ffn_up.weight": Q.F16})
    document = json.loads(run("info", tmp_path / "small.gguf", "--json"))
    assert (document["kind"], document["family"], document["name"]) == ("decoder", "llama", "small")
    assert document["stored"]["tensors"]["F16"] == 2
    assert document["dimensions"]["width"] == 64
    text = run("info", tmp_path / "small.gguf")
    assert f"next: microvlm assemble --vision ENCODER --decoder {tmp_path / 'small.gguf'} -o start" in text
    assert f"{document['parameters']['total']:,} parameters" in text


def test_a_folder_with_pickled_weights_is_described_without_loading_them(hf_folders, tmp_path):
    folder = pickled(hf_folders[0] / "vit", tmp_path / "bin")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    document = describe_part(find_part(folder))
    assert document["stored"] == {"bytes": 17, "tensors": {}}


def test_a_hub_ids_documents_are_enough(hf_folders, tmp_path, monkeypatch):
    use_hub_cache(tmp_path, monkeypatch)
    repository = tmp_path / "models--owner--vit"
    snapshot = repository / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    shutil.copy(hf_folders[0] / "vit" / "config.json", snapshot)
    document = json.loads(run("info", "owner/vit", "--json"))
    assert document["kind"] == "encoder"
    assert document["next"] == "microvlm assemble --vision owner/vit --decoder DECODER -o start"


def test_a_part_is_described_without_torch(hf_folders):
    packages = loaded_after(
        "from microvlm.commands.part_info import describe_part\n"
        "from microvlm.model.pretrained.parts import find_part\n"
        f"describe_part(find_part({str(hf_folders[0] / 'qwen2')!r}))"
    )
    assert "msgspec" in packages
    assert "torch" not in packages


def test_no_backend_runs_a_part_and_a_whole_model_is_none(hf_folders, tiny_checkpoint, tiny_bundle):
    with pytest.raises(UserError, match="assemble the part first"):
        run("info", hf_folders[0] / "vit", "--backend", "ort")
    assert part_of("nano") is None
    assert part_of(tiny_checkpoint) is None
    assert part_of(tiny_bundle) is None
    with pytest.raises(UserError, match="is a whole MicroVLM"):
        find_part(tiny_checkpoint)
