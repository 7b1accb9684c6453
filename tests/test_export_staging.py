"""A bundle's folder is there whole or not at all; an earlier one is replaced only when asked, at the end."""

import os
import subprocess
import sys

import pytest
from conftest import files_below

from microvlm.errors import UserError
from microvlm.exporters.staging import staged
from microvlm.formats.manifest import MANIFEST


def fill(stage, text: str = "new") -> None:
    (stage.path / "onnx").mkdir()
    (stage.path / "onnx" / "weights.data").write_bytes(b"x" * 5000)
    (stage.path / MANIFEST).write_text(text)


def test_a_folder_appears_under_its_name_with_everything_in_it(tmp_path):
    output = tmp_path / "bundle"
    with staged(output, force=False) as stage:
        fill(stage)
        assert not output.exists()
    assert (output / "onnx" / "weights.data").stat().st_size == 5000
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        fill_and_raise(tmp_path / "bundle", False, error)
    assert os.listdir(tmp_path) == []


def fill_and_raise(output, force: bool, error: type[BaseException]) -> None:
    with staged(output, force) as stage:
        fill(stage)
        raise error


def test_an_existing_folder_is_refused(tmp_path):
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists"), staged(output, force=False):
        pass
    assert (output / "mine.txt").read_text() == "keep"


def test_force_replaces_a_bundle_only_when_the_new_one_is_whole(tmp_path):
    output = tmp_path / "bundle"
    with staged(output, force=False) as stage:
        fill(stage, "old")
    with pytest.raises(ValueError):  # noqa: PT011
        fill_and_raise(output, True, ValueError)
    assert (output / MANIFEST).read_text() == "old"
    with staged(output, force=True) as stage:
        fill(stage, "new")
        assert (output / MANIFEST).read_text() == "old"
    assert (output / MANIFEST).read_text() == "new"
    assert os.listdir(tmp_path) == ["bundle"]


def test_force_never_replaces_what_is_no_bundle(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("home", "file"):
        with pytest.raises(UserError, match="not a bundle"), staged(tmp_path / name, force=True):
            pass
    assert (tmp_path / "home" / "thesis.tex").read_text() == "keep"


def test_a_missing_parent_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="not a folder"), staged(tmp_path / "nowhere" / "bundle", force=False):
        pass
    assert os.listdir(tmp_path) == []


def test_too_little_disk_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="MB free"), staged(tmp_path / "bundle", force=False) as stage:
        stage.require_space(10**18)
    assert os.listdir(tmp_path) == []


@pytest.mark.posix
def test_running_out_of_room_while_writing_leaves_nothing(tmp_path):
    """A real refusal by the kernel: no file may grow over 4 kB."""
    with (
        files_below(4096),
        pytest.raises(UserError, match="file is larger than"),
        staged(tmp_path / "bundle", force=False) as stage,
    ):
        fill(stage)
    assert os.listdir(tmp_path) == []


_KILLED = """
import pathlib, sys, time
from microvlm.exporters.staging import staged
with staged(pathlib.Path(sys.argv[1]), force=False) as stage:
    (stage.path / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_killed_export_leaves_no_bundle_and_the_next_one_removes_its_remains(tmp_path):
    output = tmp_path / "bundle"
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(output)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    with staged(tmp_path / "bundle2", force=False) as stage:
        fill(stage)
    assert len(os.listdir(tmp_path)) == 2  # the living export's folder is not touched
    process.kill()
    process.wait()
    process.stdout.close()
    assert not output.exists()
    with staged(output, force=False) as stage:
        fill(stage)
    assert sorted(os.listdir(tmp_path)) == ["bundle", "bundle2"]
