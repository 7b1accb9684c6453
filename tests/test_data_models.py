"""`microvlm-data models` against a hub on 127.0.0.1, and with files that somebody put there by hand."""

import hashlib
import json
import shutil

import pytest
from document_mutations import check_mutations
from drawn_emoji import run
from hub_server import Hub, folder_files, served

pytest.importorskip("huggingface_hub")

from microvlm.training.data.download.model_parts import PARTS, read_sources

DECODER, BASE, VISION, _ = PARTS
NEWEST = "ab" * 20


@pytest.fixture(scope="module")
def parts(hf_folders, tmp_path_factory):
    """The folders of a small decoder with its tokenizer, and of a small encoder with its preprocessor's file."""
    folder = tmp_path_factory.mktemp("parts")
    shutil.copytree(hf_folders[0] / "qwen2", folder / "decoder")
    shutil.copytree(hf_folders[0] / "deit", folder / "vision")
    (folder / "decoder" / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": {}}}))
    (folder / "vision" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return folder


@pytest.fixture
def hub(parts, monkeypatch):
    unused = {"pytorch_model.bin": b"pickle", "tf_model.h5": b"h5", "README.md": b"text"}
    repositories = {
        f"models/{DECODER.repository}": (DECODER.revision, {**folder_files(parts / "decoder"), **unused}),
        f"models/{VISION.repository}": (NEWEST, {**folder_files(parts / "vision"), **unused}),
    }
    with served(Hub(repositories)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
        yield hub


def fetch(output, *arguments):
    return run("models", "-o", output, *arguments)


def assert_refused(result, *words):
    """Status 2 and one sentence, after the lines that say what was fetched."""
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: ")
    for word in words:
        assert word in message


def sources(output):
    return json.loads((output / "SOURCES.json").read_text())["models"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_both_parts_are_fetched_pinned_and_recorded_without_pickles(hub, tmp_path):
    result = fetch(tmp_path / "models")
    assert result.exit_code == 0, result.stderr
    decoder, vision = tmp_path / "models" / "qwen2.5-0.5b", tmp_path / "models" / "deit-tiny"
    assert f"next: microvlm assemble --vision {vision} --decoder {decoder} -o start" in result.stdout
    assert "licence Apache-2.0" in result.stdout
    assert "pytorch_model.bin" not in names(decoder) + names(vision)
    assert "tf_model.h5" not in names(decoder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names(decoder))
    records = sources(tmp_path / "models")
    assert (records["qwen2.5-0.5b"]["revision"], records["qwen2.5-0.5b"]["pin"]) == (
        DECODER.revision,
        "known",
    )
    assert (records["deit-tiny"]["revision"], records["deit-tiny"]["pin"]) == (NEWEST, "first use")
    weights = records["deit-tiny"]["files"]["model.safetensors"]
    assert weights["sha256"] == hashlib.sha256((vision / "model.safetensors").read_bytes()).hexdigest()
    assert names(tmp_path / "models") == ["SOURCES.json", "deit-tiny", "qwen2.5-0.5b"]


def test_what_is_there_is_compared_with_the_record_and_not_fetched_again(hub, tmp_path):
    assert fetch(tmp_path, "--model", "vision").exit_code == 0
    sent = hub.sent.total()
    document = json.loads(fetch(tmp_path, "--model", "vision", "--json").stdout)
    assert document["models"]["deit-tiny"]["revision"] == NEWEST
    assert hub.sent.total() == sent
    path = tmp_path / "deit-tiny" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert_refused(fetch(tmp_path, "--model", "vision"), "model.safetensors", "SOURCES.json", "delete")


def test_a_part_that_was_pinned_at_first_use_comes_from_that_commit_again(hub, tmp_path):
    assert fetch(tmp_path, "--model", "vision").exit_code == 0
    shutil.rmtree(tmp_path / "deit-tiny")
    files = hub.repositories[f"models/{VISION.repository}"][1]
    hub.repositories[f"models/{VISION.repository}"] = ("cd" * 20, files)
    assert_refused(fetch(tmp_path, "--model", "vision"), NEWEST, "another --revision")


def test_an_interrupted_download_goes_on_at_the_byte_where_it_stopped(hub, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096
    )  # 10 MB would be the whole file
    content = hub.repositories[f"models/{VISION.repository}"][1]["model.safetensors"]
    hub.broken["model.safetensors"] = len(content) // 2
    assert_refused(fetch(tmp_path, "--model", "vision"), "model.safetensors", "run the same command again")
    assert not (tmp_path / "deit-tiny").exists()
    part = tmp_path / ".deit-tiny.partial" / "model.safetensors.part"
    stopped = part.stat().st_size
    assert part.read_bytes() == content[:stopped]
    assert len(content) // 2 - stopped < 4096
    hub.broken.clear()
    hub.sent.clear()
    result = fetch(tmp_path, "--model", "vision")
    assert result.exit_code == 0, result.stderr
    assert hub.sent["model.safetensors"] == len(content) - stopped
    assert (tmp_path / "deit-tiny" / "model.safetensors").read_bytes() == content


def test_a_file_with_another_hash_is_refused_and_removed(hub, tmp_path):
    for name in ("model.safetensors", "config.json"):  # one of each kind of hash
        hub.altered = {name}
        assert_refused(fetch(tmp_path, "--model", "decoder"), name, "another hash")
        assert not (tmp_path / "qwen2.5-0.5b").exists()
        assert not list(tmp_path.rglob(f"{name}*"))
    hub.altered = set()
    assert fetch(tmp_path, "--model", "decoder").exit_code == 0


def test_missing_repositories_files_and_revisions_are_one_sentence(hub, tmp_path):
    assert_refused(fetch(tmp_path, "--model", "qwen2.5-0.5b-base"), BASE.repository, "check the name")
    assert_refused(fetch(tmp_path, "--model", "decoder", "--revision", "ef" * 20), "ef" * 20, "--revision")
    assert_refused(fetch(tmp_path, "--revision", "main"), "--revision belongs to one part")
    hub.refused["model.safetensors"] = 503
    assert_refused(fetch(tmp_path, "--model", "decoder"), "503", "run the same command again")
    del hub.repositories[f"models/{VISION.repository}"][1]["preprocessor_config.json"]
    assert_refused(fetch(tmp_path, "--model", "vision"), "lacks preprocessor_config.json")


def test_a_repository_without_safetensors_gives_its_pickle(hub, tmp_path):
    del hub.repositories[f"models/{VISION.repository}"][1]["model.safetensors"]
    assert fetch(tmp_path, "--model", "vision").exit_code == 0
    assert "pytorch_model.bin" in names(tmp_path / "deit-tiny")


def test_without_a_network_one_sentence_says_which_files_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = fetch(tmp_path / "models")
    assert_refused(result, "cannot be reached", "config.json, model.safetensors and tokenizer.json of Qwen/")
    assert f"into {tmp_path / 'models' / 'deit-tiny'} by hand" in result.stderr
    assert not (tmp_path / "models").exists()


def test_files_put_there_by_hand_are_checked_recorded_and_accepted(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    shutil.copytree(parts / "decoder", tmp_path / "qwen2.5-0.5b")
    shutil.copytree(parts / "vision", tmp_path / "deit-tiny")
    result = fetch(tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "put there by hand" in result.stdout
    assert sources(tmp_path)["deit-tiny"]["revision"] is None
    assert_refused(fetch(tmp_path, "--model", "vision", "--revision", NEWEST), "by hand", "another -o")


def test_wrong_files_put_there_by_hand_are_refused(parts, tmp_path):
    folder = tmp_path / "qwen2.5-0.5b"
    shutil.copytree(parts / "decoder", folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert_refused(fetch(tmp_path, "--model", "decoder"), "model.safetensors", "damaged")
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 121}))
    assert_refused(fetch(tmp_path, "--model", "decoder"), "do not belong to config.json", "not 121 x 64")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert_refused(fetch(tmp_path, "--model", "decoder"), "2 layers and config.json 3")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    assert_refused(fetch(tmp_path, "--model", "decoder"), "lacks tokenizer.json")
    assert not (tmp_path / "SOURCES.json").exists()


def test_a_damaged_record_is_refused(tmp_path):
    file = {"bytes": 10, "sha256": "0" * 64}
    record = {"repository": "a/b", "revision": None, "pin": "known", "licence": "x", "files": {"a": file}}

    def write_and_read(content):
        (tmp_path / "SOURCES.json").write_bytes(content)
        return read_sources(tmp_path)

    check_mutations({"format": 1, "models": {"deit-tiny": record}}, write_and_read)
