"""Which symbolic links of a model's folder are followed."""

import hashlib
from pathlib import Path

import pytest

from microvlm.formats.links import leads_into

pytestmark = pytest.mark.posix
HASH = hashlib.sha256(b"weights").hexdigest()


def link(path: Path, target: str | Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    return path


def test_a_file_and_a_link_inside_the_folder_are_inside(tmp_path):
    file = write(tmp_path / "model" / "onnx" / "weights.data")
    assert leads_into(file, tmp_path / "model")
    assert leads_into(link(tmp_path / "model" / "again.data", "onnx/weights.data"), tmp_path / "model")
    assert leads_into(tmp_path / "model" / "absent", tmp_path / "model")
    assert leads_into(file, link(tmp_path / "other-name", "model"))


@pytest.mark.parametrize(
    ("blob", "snapshot"),
    [
        ("repository/blobs", "repository/snapshots/0123"),
        ("hf/blobs", "hf/snap"),
    ],
)
def test_a_link_to_a_blob_of_the_same_hub_cache_is_inside(tmp_path, blob, snapshot):
    target = write(tmp_path / blob / HASH)
    assert leads_into(link(tmp_path / snapshot / "onnx" / "weights.data", target), tmp_path / snapshot)


def test_a_blob_that_lies_in_the_store_of_all_repositories_is_inside(tmp_path):
    write(tmp_path / "blobs" / HASH[:2] / HASH)
    link(tmp_path / "models--me--nano" / "blobs" / HASH, f"../../blobs/{HASH[:2]}/{HASH}")
    snapshot = tmp_path / "models--me--nano" / "snapshots" / "0123"
    assert leads_into(link(snapshot / "weights.data", f"../../blobs/{HASH}"), snapshot)


@pytest.mark.parametrize(
    "target",
    [
        "outside",
        "blobs/passwords.txt",
        "other/blobs/" + HASH,
        "repository/blobs/below/" + HASH,
        "repository/snapshots/4567/" + HASH,
    ],
)
def test_any_other_link_is_outside(tmp_path, target):
    snapshot = tmp_path / "repository" / "snapshots" / "0123"
    assert not leads_into(link(snapshot / "weights.data", write(tmp_path / target)), snapshot)
    folder = tmp_path / "model"
    assert not leads_into(link(folder / "weights.data", tmp_path / target), folder)


def test_a_path_that_climbs_out_is_outside(tmp_path):
    write(tmp_path / "model" / "weights.data")
    assert not leads_into(tmp_path / "model" / ".." / "secret", tmp_path / "model")
    assert not leads_into("/etc/passwd", tmp_path / "model")
