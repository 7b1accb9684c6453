"""The files of a bundle are what its manifest lists, and what was checked is what is read and mapped later."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from microvlm.backends import load
from microvlm.config import CONFIG
from microvlm.errors import UserError
from microvlm.formats import bundle as bundle_format
from microvlm.formats.bundle import FILES_READ_BY_NAME, BundleFiles, open_bundle
from microvlm.formats.onnx_weights import external_locations
from microvlm.inputs.tokenizer_tables import TABLES
from microvlm.loaded_model import load_processor
from microvlm.model.checkpoint import PROCESSOR_FILES

IDS = np.array([[5, 6, 7]])
GRAPH, DATA = "onnx/embed_tokens.onnx", "onnx/embedding.data"


@pytest.fixture
def copy(speaking_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(speaking_bundle, tmp_path / "bundle"))


@pytest.fixture
def large(monkeypatch) -> None:
    """Every bundle counts as a large one, whose data files are not hashed."""
    monkeypatch.setattr(bundle_format, "HASH_BELOW_BYTES", 0)
    monkeypatch.setattr(bundle_format, "SMALL_FILE_BYTES", 1000)


def rehash(bundle: Path, *names: str, listed: bool = True) -> None:
    """Bring the entries of `names` in the manifest up to date, or remove them."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in names:
        manifest["files"].pop(name, None)
        if listed:
            content = (bundle / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def refer_to(bundle: Path, location: str) -> None:
    """Make the table of embed_tokens lie in another file, with right hashes."""
    model = onnx.load(str(bundle / GRAPH), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    rehash(bundle, GRAPH)


def altered(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_every_file_that_loading_reads_by_name_is_known():
    assert {CONFIG, TABLES, "memory_prior.safetensors", *PROCESSOR_FILES} == set(FILES_READ_BY_NAME)


def test_every_changed_file_is_refused_readme_and_example_too(copy):
    names = [path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()]
    assert {"README.md", "example.py"} < set(names)
    for name in set(names) - {"manifest.json"}:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(altered(content))
        with pytest.raises(UserError, match="was altered"):
            open_bundle(copy)
        (copy / name).write_bytes(content)
    open_bundle(copy)


def test_an_older_bundle_whose_manifest_lacks_the_page_and_the_program_still_loads(copy):
    rehash(copy, "README.md", "example.py", listed=False)
    (copy / "README.md").write_text("# changed")
    assert load("ort", copy).embed_tokens(IDS).shape[1] == 3


def test_other_files_may_lie_in_the_folder(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "onnx" / "old.data").write_bytes(b"unused")
    os.mkfifo(copy / "pipe")
    open_bundle(copy, verify=True)


@pytest.mark.parametrize("name", FILES_READ_BY_NAME)
@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_an_unlisted_file_that_loading_would_read_is_refused(name, backend, copy):
    rehash(copy, name, listed=False)
    with pytest.raises(UserError, match=rf"{name} is not in the bundle's manifest\.json: remove it"):
        load(backend, copy)


@pytest.mark.parametrize(
    "location",
    [
        "other.data",
        "../outside.data",
        "../../outside.data",
        "sub/other.data",
        "{bundle}/onnx/other.data",
        "a/../x",
    ],
)
@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_a_graph_that_refers_to_an_unlisted_file_is_refused(location, backend, copy):
    content = (copy / DATA).read_bytes()
    (copy / "onnx" / "sub").mkdir()
    for place in ("onnx/other.data", "onnx/sub/other.data", "outside.data", "../outside.data"):
        (copy / place).write_bytes(content)
    refer_to(copy, location.format(bundle=copy))
    with pytest.raises(
        UserError, match=r"embed_tokens\.onnx refers to the file '.*', which the bundle's manifest"
    ):
        load(backend, copy)


def test_listed_data_in_a_folder_below_is_read(copy):
    expected = load("ort", copy).embed_tokens(IDS)
    (copy / "onnx" / "sub").mkdir()
    shutil.copy(copy / DATA, copy / "onnx/sub/other.data")
    rehash(copy, "onnx/sub/other.data")
    refer_to(copy, "./sub/other.data")
    assert np.array_equal(load("ort", copy).embed_tokens(IDS), expected)


@pytest.mark.posix
@pytest.mark.parametrize("link", ["outside", "folder"])
def test_a_link_to_weights_outside_of_the_bundle_is_refused(link, copy, tmp_path, large):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(copy / DATA, outside / "embedding.data")
    if link == "outside":
        (copy / DATA).unlink()
        (copy / DATA).symlink_to(outside / "embedding.data")
    else:
        (copy / "onnx/sub").symlink_to(outside)
        rehash(copy, "onnx/sub/embedding.data")
        refer_to(copy, "sub/embedding.data")
    for backend in ("ort", "torch"):
        with pytest.raises(UserError, match=r"embedding\.data is a link to a file outside of the bundle"):
            load(backend, copy)


def everywhere(location: str) -> onnx.ModelProto:
    """A model with a tensor in another file at every place where ONNX lets one be."""
    count = 0

    def tensor() -> TensorProto:
        nonlocal count
        count += 1
        result = TensorProto(name=f"t{count}", data_type=TensorProto.FLOAT, dims=[1])
        result.data_location = TensorProto.EXTERNAL
        result.external_data.add(key="offset", value="0")
        result.external_data.add(key="location", value=f"{location}{count}")
        return result

    def sparse() -> onnx.SparseTensorProto:
        return onnx.SparseTensorProto(values=tensor(), indices=tensor(), dims=[1])

    def node(depth: int) -> onnx.NodeProto:
        result = helper.make_node("Constant", [], ["c"], value=tensor())
        result.attribute.append(helper.make_attribute("many", [tensor(), tensor()]))
        result.attribute.append(helper.make_attribute("sparse", sparse()))
        result.attribute.append(helper.make_attribute("sparses", [sparse()]))
        if depth:
            result.attribute.append(helper.make_attribute("body", graph(depth - 1)))
            result.attribute.append(helper.make_attribute("bodies", [graph(depth - 1)]))
        return result

    def graph(depth: int) -> onnx.GraphProto:
        result = helper.make_graph([node(depth)], "allocation", [], [], [tensor()])
        result.sparse_initializer.append(sparse())
        return result

    function = onnx.FunctionProto(name="f", domain="d")
    function.node.append(node(1))
    function.attribute_proto.append(helper.make_attribute("default", tensor()))
    model = helper.make_model(graph(2), functions=[function])
    training = model.training_info.add()
    training.algorithm.CopyFrom(graph(0))
    training.initialization.CopyFrom(graph(0))
    assert {field.name for field in onnx.ModelProto.DESCRIPTOR.fields} <= {
        *("ir_version", "opset_import", "producer_name", "producer_version", "domain", "model_version"),
        *("doc_string", "graph", "metadata_props", "training_info", "functions", "configuration"),
    }
    model.doc_string = str(count)
    return model


@pytest.mark.parametrize("location", ["x.data", "d/" + "y" * 200 + ".data"])
@pytest.mark.parametrize("has_remark", [False, True])
def test_every_external_tensor_of_a_model_is_found_wherever_it_is(location, has_remark):
    model = everywhere(location)
    count = int(model.doc_string)
    assert count > 30
    if not has_remark:
        model.graph.name = "main"
    expected = {f"{location}{number}" for number in range(1, count + 1)}
    assert external_locations(model.SerializeToString(), Path("m.onnx")) == expected


def test_an_entry_whose_value_stands_before_its_key_is_found():
    inner = b"\x12\x04evil\x0a\x08location"
    entry = b"\x6a" + bytes([len(inner)]) + inner
    tensor = b"\x2a" + bytes([len(entry)]) + entry
    graph = b"\x3a" + bytes([len(tensor)]) + tensor
    assert external_locations(graph, Path("m.onnx")) == {"evil"}


@pytest.mark.parametrize("content", [b"location", b"\x3a\x7flocation", b"\x00" * 9 + b"location"])
def test_what_is_no_model_is_one_sentence(content):
    with pytest.raises(UserError, match="is not an ONNX file"):
        external_locations(content, Path("m.onnx"))


@pytest.mark.posix
@pytest.mark.parametrize("verify", [None, True, False])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "socket", "dangling link", "loop", "device"])
def test_anything_but_a_regular_file_in_a_files_place_is_one_sentence_and_never_waited_for(
    kind, verify, copy, monkeypatch
):
    monkeypatch.chdir(copy)  # a socket's name must be short
    for name in open_bundle(copy).files:
        path, kept = copy / name, copy / "kept"
        path.rename(kept)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
        elif kind != "missing":
            path.symlink_to({"loop": path, "device": "/dev/zero"}.get(kind, "nowhere"))
        with pytest.raises(UserError) as error:
            open_bundle(copy, verify)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        kept.rename(path)
    open_bundle(copy, verify)


def test_a_hard_link_is_a_file(copy, tmp_path):
    for name in open_bundle(copy).files:
        os.link(copy / name, tmp_path / name.replace("/", "-"))
    assert load("ort", copy).embed_tokens(IDS).shape[1] == 3


@pytest.mark.posix
def test_a_file_that_may_not_be_read_is_one_sentence(speaking_bundle, public_folder):
    from conftest import another_user

    copy = Path(shutil.copytree(speaking_bundle, public_folder / "bundle"))
    os.chmod(copy, 0o755)
    for name in (GRAPH, DATA, "tokenizer.json"):
        (copy / name).chmod(0)
        with another_user(), pytest.raises(UserError, match=f"{name}: Permission denied"):
            open_bundle(copy)
        (copy / name).chmod(0o644)


@pytest.mark.posix
def test_a_giant_file_with_holes_is_refused_where_it_would_be_read_and_not_read_where_it_is_mapped(copy):
    terabyte = 10**12
    for name, sentence in ((GRAPH, "too many"), ("memory_prior.safetensors", "too many"), (DATA, None)):
        copied = (copy / name).read_bytes()
        os.truncate(copy / name, terabyte)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"][name]["bytes"] = terabyte
        (copy / "manifest.json").write_text(json.dumps(manifest))
        if sentence:
            with pytest.raises(UserError, match=sentence):
                load("ort", copy).memory_prior()
        else:
            assert load("ort", copy).embed_tokens(IDS).shape[1] == 3
        (copy / name).write_bytes(copied)
        rehash(copy, name)


def replace_by_rename(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(altered(path.read_bytes()))
    shutil.copystat(path, other)
    other.rename(path)


def write_in_place(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_by_link(path: Path) -> None:
    other = path.with_name("other")
    path.rename(other)
    other.write_bytes(altered(other.read_bytes()))
    path.symlink_to(other)


@pytest.mark.posix
@pytest.mark.parametrize("change", [replace_by_rename, write_in_place, replace_by_link, Path.unlink])
@pytest.mark.parametrize("name", [GRAPH, DATA])
@pytest.mark.parametrize("verify", [None, True, False])
def test_a_file_that_changes_between_the_check_and_the_session_is_refused(
    change: Callable[[Path], None], name, verify, copy, large
):
    runtime = load("ort", copy, verify=verify)
    change(copy / name)
    with pytest.raises(UserError, match=r"was changed or replaced after the bundle was opened|is missing"):
        runtime.embed_tokens(IDS)


@pytest.mark.posix
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", TABLES, "memory_prior.safetensors"])
def test_a_small_file_that_changes_after_the_check_is_refused(name, copy):
    runtime = load("ort", copy)
    (copy / name).write_bytes((copy / name).read_bytes())
    with pytest.raises(UserError, match=f"{name} was changed or replaced after the bundle was opened"):
        (runtime.memory_prior() if "prior" in name else load_processor(runtime))


@pytest.mark.posix
def test_a_file_that_changes_while_torch_reads_is_refused(copy, monkeypatch):
    from microvlm.backends import torch_eager

    initializers = torch_eager._initializers

    def read_late(*arguments):
        write_in_place(copy / DATA)
        return initializers(*arguments)

    monkeypatch.setattr(torch_eager, "_initializers", read_late)
    with pytest.raises(UserError, match=r"embedding\.data was changed or replaced"):
        load("torch", copy)


@pytest.mark.posix
def test_weights_that_are_cut_or_overwritten_while_mapped_are_refused_and_not_a_signal(copy):
    runtime = load("ort", copy)
    runtime.embed_tokens(IDS)
    os.truncate(copy / DATA, 10)
    with pytest.raises(UserError, match=r"embedding\.data was changed or replaced"):
        runtime.embed_tokens(IDS)


@pytest.mark.posix
def test_a_bundle_that_is_replaced_or_removed_does_no_harm_to_whoever_has_mapped_it(copy):
    runtime = load("ort", copy)
    runtime.open_ahead()
    expected, prior = runtime.embed_tokens(IDS), runtime.memory_prior()
    shutil.rmtree(copy)
    assert np.array_equal(runtime.embed_tokens(IDS), expected)
    assert np.array_equal(runtime.memory_prior().mean, prior.mean)


@pytest.mark.linux
def test_no_weights_are_copied_and_descriptors_are_returned(copy):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        runtime = load("ort", copy)
        runtime.open_ahead()
        mapped = Path("/proc/self/maps").read_text()
        assert str(copy / DATA) in mapped
        assert count() - before <= 8
        del runtime
    files = BundleFiles(copy)
    files.hold(GRAPH)
    files.hold(GRAPH)
    assert count() == before + 1
    del files
    assert count() == before
