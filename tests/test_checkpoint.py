"""Checkpoints: what is saved comes back bit for bit, and every damaged file is one sentence."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    FLOAT,
    TERNARY,
    another_user,
    files_below,
    mounted,
    seeded_model,
    tiny_config,
    use_hub_cache,
)
from safetensors.torch import load_file, save_file
from test_ternary_lowering import run

from microvlm.config import QuantizationConfig
from microvlm.errors import UserError
from microvlm.formats.weight_format import WeightFormat
from microvlm.model import checkpoint as checkpoint_module
from microvlm.model.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM

STORAGES = [
    None,
    WeightFormat(1.58, "2bit", 8),
    WeightFormat(1.58, "base3", 4),
    WeightFormat(4, "2bit", 16),
    WeightFormat(8, "2bit", 32),
    WeightFormat(16, "2bit", 16),
    WeightFormat(32, "2bit", 32),
]


@pytest.fixture(scope="module")
def saved_checkpoint(tmp_path_factory, ternary_model):
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    ternary_model.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged_checkpoint(saved_checkpoint, tmp_path):
    """A copy of the saved checkpoint to spoil."""
    for path in saved_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_config(folder, change) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same_model(loaded, model) -> None:
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    assert all(torch.equal(a, b) for a, b in zip(run(loaded), run(model), strict=True))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_every_storage_comes_back_bit_for_bit(ternary_model, tmp_path, storage):
    model = ternary_model if storage is None else lower(ternary_model, storage)
    model.save_pretrained(tmp_path / "saved")
    loaded = MicroVLM.from_pretrained(tmp_path / "saved")
    assert not loaded.training
    assert loaded.config == model.config
    assert_same_model(loaded, model)


@pytest.mark.parametrize(
    "quantization", [FLOAT, QuantizationConfig(32, 32, 8), QuantizationConfig(1.58, 32, 32)], ids=str
)
@pytest.mark.parametrize("bits", [32, 16, 8, 4, 1.58])
def test_float_trained_parts_come_back_too(tmp_path, quantization, bits):
    model = lower(seeded_model(tiny_config(quantization)), WeightFormat(bits, "2bit", 32))
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(load_checkpoint(tmp_path / "saved"), model)


def test_only_two_files_are_written_and_nothing_is_left_aside(saved_checkpoint):
    assert sorted(path.name for path in saved_checkpoint.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in saved_checkpoint.parent.iterdir()] == ["saved"]


def test_saving_again_replaces_weights_and_keeps_the_tokenizer(saved_checkpoint, tmp_path):
    first, second = seeded_model(tiny_config(TERNARY), 1), seeded_model(tiny_config(TERNARY), 2)
    first.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    second.save_pretrained(tmp_path / "model")
    assert torch.equal(load_checkpoint(tmp_path / "model").decoder.norm.weight, second.decoder.norm.weight)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"


def test_a_loaded_model_that_is_saved_elsewhere_still_speaks(speaking_checkpoint, tmp_path):
    loaded = MicroVLM.from_pretrained(speaking_checkpoint)
    loaded.save_pretrained(tmp_path / "copy")
    request = {"prompts": ["what is this?"], "max_new_tokens": 4}
    assert MicroVLM.from_pretrained(tmp_path / "copy").generate(**request) == loaded.generate(**request)


def test_another_models_folder_is_not_overwritten(ternary_model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match="not a MicroVLM"):
        ternary_model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_place_that_cannot_be_written_is_a_sentence(ternary_model, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            save_checkpoint(ternary_model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.posix
def test_a_killed_save_over_an_old_checkpoint_keeps_the_old_one_whole(saved_checkpoint, tmp_path):
    """Killed at the first flush, when weights and configuration of the new one are written and nothing is renamed."""
    target = tmp_path / "model"
    seeded_model(tiny_config(FLOAT), 1).save_pretrained(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    killed = """
import os, signal, sys
from microvlm import MicroVLM
model = MicroVLM.from_pretrained(sys.argv[1])
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
model.save_pretrained(sys.argv[2])
"""
    process = subprocess.run(
        [sys.executable, "-P", "-c", killed, str(saved_checkpoint), str(target)], check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 2
    load_checkpoint(saved_checkpoint).save_pretrained(target)
    assert (target / "config.json").read_bytes() == (saved_checkpoint / "config.json").read_bytes()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.posix
def test_a_model_is_saved_into_the_working_directory(tmp_path, monkeypatch):
    first, second = seeded_model(tiny_config(TERNARY), 1), seeded_model(tiny_config(TERNARY), 2)
    monkeypatch.chdir(tmp_path)
    for model in (first, second):  # into the empty folder, and over the first
        model.save_pretrained(".")
        assert os.path.samestat(os.stat("."), tmp_path.stat())
        assert torch.equal(load_checkpoint(".").decoder.norm.weight, model.decoder.norm.weight)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_file_that_another_process_puts_into_the_folder_meanwhile_is_kept(ternary_model, tmp_path):
    target = tmp_path / "model"
    ternary_model.save_pretrained(target)

    def write_log(_folder):
        (target / "log.txt").write_text("log")

    save_checkpoint(ternary_model, target, write_log)
    assert (target / "log.txt").read_text() == "log"
    load_checkpoint(target)
    assert os.listdir(tmp_path) == ["model"]


def test_files_on_a_file_system_that_is_mounted_below_the_checkpoint_are_kept(ternary_model, tmp_path):
    ternary_model.save_pretrained(tmp_path / "model")
    data = tmp_path / "model" / "data"
    data.mkdir()
    with mounted(data, "-t", "tmpfs", "tmpfs"):
        (data / "precious").touch()
        ternary_model.save_pretrained(tmp_path / "model")
        assert (data / "precious").exists()
    load_checkpoint(tmp_path / "model")


def test_a_checkpoint_in_an_overlay_is_replaced(ternary_model, tmp_path):
    ternary_model.save_pretrained(tmp_path / "lower" / "model")
    writable, merged = tmp_path / "writable", tmp_path / "merged"
    for folder in (writable, merged):
        folder.mkdir()
    model = seeded_model(tiny_config(TERNARY), 5)
    with mounted(writable, "-t", "tmpfs", "tmpfs"):
        (writable / "upper").mkdir()
        (writable / "work").mkdir()
        folders = f"lowerdir={tmp_path / 'lower'},upperdir={writable / 'upper'},workdir={writable / 'work'}"
        with mounted(merged, "-t", "overlay", "overlay", "-o", folders):
            model.save_pretrained(merged / "model")
            loaded = load_checkpoint(merged / "model")
            assert torch.equal(loaded.decoder.norm.weight, model.decoder.norm.weight)
            assert os.listdir(merged) == ["model"]


def test_a_file_that_cannot_be_read_does_not_stand_in_the_way(ternary_model, public_folder):
    target = public_folder / "model"
    ternary_model.save_pretrained(target)
    target.chmod(0o777)
    (target / "secret").touch(0o600)
    for names in (["secret"], []):  # also where only the folder above is another's
        with another_user():
            ternary_model.save_pretrained(target)
        assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", *names]
        (target / "secret").unlink(missing_ok=True)


@pytest.mark.posix
def test_a_checkpoint_whose_replacement_was_cut_off_is_finished_by_the_next_look_or_refused(
    saved_checkpoint, tmp_path
):
    target = tmp_path / "model"
    seeded_model(tiny_config(FLOAT), 1).save_pretrained(target)
    (target / "notes.txt").write_text("mine")
    killed = """
import os, signal, sys
from pathlib import Path
from microvlm import MicroVLM
model = MicroVLM.from_pretrained(sys.argv[1])
replace = os.replace
def replace_configuration_only(source, target):
    if Path(target).name not in ("config.json", ".incomplete"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_configuration_only
model.save_pretrained(sys.argv[2])
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", killed, str(saved_checkpoint), str(target)], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert (target / ".incomplete").exists()
    loaded, expected = load_checkpoint(target), load_checkpoint(saved_checkpoint)
    assert loaded.config == expected.config
    assert torch.equal(loaded.decoder.norm.weight, expected.decoder.norm.weight)
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "notes.txt"]
    (target / ".incomplete").touch()  # the new files are lost
    with pytest.raises(UserError, match="was only partly replaced: save it again"):
        load_checkpoint(target)
    load_checkpoint(saved_checkpoint).save_pretrained(target)
    load_checkpoint(target)
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "notes.txt"]


@pytest.mark.posix
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(
    saved_checkpoint, ternary_model, tmp_path, monkeypatch
):
    target = tmp_path / "model"
    ternary_model.save_pretrained(target)
    read_tensors = checkpoint_module.read_tensors

    def read_late(path):
        monkeypatch.setattr(checkpoint_module, "read_tensors", read_tensors)
        ternary_model.save_pretrained(target)
        return read_tensors(path)

    monkeypatch.setattr(checkpoint_module, "read_tensors", read_late)
    with pytest.raises(UserError, match="was replaced while it was read: load it again"):
        load_checkpoint(target)
    load_checkpoint(target)


def test_others_may_read_the_weights_that_the_umask_lets_them_read(saved_checkpoint):
    assert len({path.stat().st_mode for path in saved_checkpoint.iterdir()}) == 1


@pytest.mark.posix
def test_a_full_disk_leaves_nothing_behind(ternary_model, tmp_path):
    with files_below(100_000), pytest.raises(UserError, match="cannot be written"):
        ternary_model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_bundle_in_the_place_of_a_checkpoint_is_told_apart(damaged_checkpoint):
    (damaged_checkpoint / "model.safetensors").unlink()
    (damaged_checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="exported bundle"):
        load_checkpoint(damaged_checkpoint)


def test_a_loaded_model_trains_on_and_owns_its_memory(saved_checkpoint):
    before = (saved_checkpoint / "model.safetensors").read_bytes()
    model = MicroVLM.from_pretrained(saved_checkpoint).train()
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    ids = torch.arange(6)[None]
    model(model.embed(ids), torch.ones_like(ids)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (saved_checkpoint / "model.safetensors").read_bytes() == before


def test_a_missing_key_is_named(damaged_checkpoint):
    change_tensors(damaged_checkpoint, lambda tensors: tensors.pop("decoder.norm.weight"))
    with pytest.raises(UserError, match=r"lacks 'decoder\.norm\.weight'"):
        load_checkpoint(damaged_checkpoint)


def test_an_unexpected_key_is_named(damaged_checkpoint):
    change_tensors(damaged_checkpoint, lambda tensors: tensors.update(extra=torch.ones(1)))
    with pytest.raises(UserError, match="unexpected 'extra'"):
        load_checkpoint(damaged_checkpoint)


def test_a_reshaped_key_is_named(damaged_checkpoint):
    change_tensors(
        damaged_checkpoint, lambda tensors: tensors.update({"decoder.norm.weight": torch.ones(65)})
    )
    with pytest.raises(UserError, match=r"'decoder\.norm\.weight' is \(65,\)"):
        load_checkpoint(damaged_checkpoint)


def test_integers_in_the_place_of_floats_are_refused(damaged_checkpoint):
    change_tensors(
        damaged_checkpoint, lambda tensors: tensors.update({"decoder.norm.weight": torch.ones(64).long()})
    )
    with pytest.raises(UserError, match=r"'decoder\.norm\.weight' is int64"):
        load_checkpoint(damaged_checkpoint)


@pytest.mark.parametrize("kept_bytes", [0, 7, 500, 200_000])
def test_a_truncated_file_is_refused(damaged_checkpoint, kept_bytes):
    weights = damaged_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(damaged_checkpoint)


def test_pickled_weights_are_never_read(damaged_checkpoint):
    (damaged_checkpoint / "model.safetensors").unlink()
    torch.save({}, damaged_checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_checkpoint(damaged_checkpoint)
    torch.save({}, damaged_checkpoint / "model.safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(damaged_checkpoint)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ("{", "metadata 'layers' is not valid JSON"),
        ("[]", "metadata 'layers': the document must be an object"),
        ('{"decoder": 1}', "must be an object, not a whole number"),
        ('{"decoder": {"kind": "int8", "rows": -1, "columns": 1}}', "rows' must be a whole number >= 1"),
        (
            '{"a.b": {"kind": "int8", "rows": 1, "columns": 1, "scale": 1}}',
            "lists a layer 'a.b' that this model does not have",
        ),
    ],
)
def test_a_senseless_list_of_layers_is_refused(damaged_checkpoint, layers, sentence):
    tensors = load_file(damaged_checkpoint / "model.safetensors")
    save_file(tensors, damaged_checkpoint / "model.safetensors", metadata={"layers": layers})
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_checkpoint(damaged_checkpoint)


def test_a_storage_of_a_later_version_says_upgrade(damaged_checkpoint):
    tensors = load_file(damaged_checkpoint / "model.safetensors")
    layers = {"decoder.layers.0.mlp.up_proj": {"kind": "ternary9x9", "rows": 96, "columns": 64, "scale": 1}}
    save_file(tensors, damaged_checkpoint / "model.safetensors", metadata={"layers": json.dumps(layers)})
    with pytest.raises(UserError, match=r"ternary9x9.*upgrade"):
        load_checkpoint(damaged_checkpoint)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: raw.update(model_type="qwen2"), r"is a decoder \(qwen2\) alone: assemble it first"),
        (lambda raw: raw.update(format=99), "newer microvlm"),
        (lambda raw: raw["text"].update(flux=1), "flux"),
        (lambda raw: raw["memory"].update(slots=48), "fewer than 'code_size'"),
        (lambda raw: raw["text"].update(num_key_value_heads=0), "num_key_value_heads"),
        (
            lambda raw: raw["vision"].update(image_size="big"),
            "'vision.image_size' must be a whole number, not text",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_a_sentence(damaged_checkpoint, change, sentence):
    change_config(damaged_checkpoint, change)
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(damaged_checkpoint)


@pytest.mark.parametrize("source", ["no-such-checkpoint", "./absent", "/absent/model", "a/b/c"])
def test_a_source_that_is_nothing_says_what_would_be(source):
    with pytest.raises(
        UserError, match=r"there is no model .* give the folder of a checkpoint or a bundle, a hub id"
    ):
        resolve_checkpoint(source)


def test_a_hub_id_of_our_format_loads_from_the_hubs_cache(
    saved_checkpoint, tmp_path, monkeypatch, ternary_model
):
    use_hub_cache(tmp_path, monkeypatch)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for path in saved_checkpoint.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    assert_same_model(MicroVLM.from_pretrained("owner/name"), ternary_model)
    with pytest.raises(UserError, match="the hub gave no model of that name"):
        resolve_checkpoint("owner/absent")
