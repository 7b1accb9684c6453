"""The files of a bundle are what its manifest lists, and what was checked is what is read and mapped later."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from microvlm.backends import load
from microvlm.config import CONFIG
from microvlm.errors import UserError
from microvlm.formats import bundle as bundle_format
from microvlm.formats.bundle import DOCUMENTS, FILES_READ_BY_NAME, BundleFiles, open_bundle
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


@pytest.mark.parametrize("verify", [None, True])
def test_every_changed_file_is_refused_and_the_documents_on_request(verify, copy):
    names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert set(DOCUMENTS) < names
    for name in names - {"manifest.json"} - (set() if verify else set(DOCUMENTS)):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(altered(content))
        with pytest.raises(UserError, match="was altered"):
            open_bundle(copy, verify)
        (copy / name).write_bytes(content)
    open_bundle(copy, verify)


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_the_page_of_a_bundle_may_be_edited_and_its_program_removed(backend, copy):
    (copy / "README.md").write_text("# My model card")
    (copy / "example.py").unlink()
    assert load(backend, copy).embed_tokens(IDS).shape[1] == 3
    (copy / "README.md").unlink()
    assert load(backend, copy, verify=True).embed_tokens(IDS).shape[1] == 3


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


def number(value: int) -> bytes:
    """A varint."""
    result = b""
    while value > 127:
        result, value = result + bytes([value & 127 | 128]), value >> 7
    return result + bytes([value])


def field(key: int, content: bytes) -> bytes:
    return number(key << 3 | 2) + number(len(content)) + content


KEY, LISTED = field(1, b"location"), field(2, b"embedding.data")
REFERENCE = field(13, KEY + LISTED)


def model_with(tensor: bytes) -> bytes:
    return field(7, field(5, tensor))


def test_the_letters_of_the_key_in_other_fields_are_no_reference():
    comment = field(13, field(1, b"comment") + field(2, b"location"))
    content = model_with(field(8, b"location") + field(9, b"location") + comment)
    assert external_locations(content, Path("m.onnx")) == set()
    assert external_locations(content + model_with(REFERENCE), Path("m.onnx")) == {"embedding.data"}


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(field(3, b"\x6a\x1a") + KEY + LISTED + field(2, b"evil"), id="hidden in a field"),
        pytest.param(KEY + LISTED + field(2, b"evil"), id="two values"),
        pytest.param(field(1, b"comment") + KEY + field(2, b"evil"), id="two keys"),
        pytest.param(KEY + LISTED + number(3 << 3) + b"\x01", id="another field"),
        pytest.param(KEY + number(2 << 3) + b"\x01" + field(2, b"evil"), id="a number as value"),
        pytest.param(KEY + number(2 << 3 | 1 << 35 | 2) + b"\x04evil", id="a tag of more than 32 bits"),
        pytest.param(KEY + b"\x92\x00\x04evil", id="a tag longer than needed"),
        pytest.param(KEY + b"\x12\x84\x00evil", id="a length longer than needed"),
        pytest.param(KEY + b"\x12\x84\x80\x80\x80\x10evil", id="a length of 32 bits"),
        pytest.param(KEY + field(2, b"evil\0"), id="a zero byte"),
        pytest.param(KEY + b"\x12\x05evil", id="over the end"),
    ],
)
def test_a_reference_that_readers_could_take_in_two_ways_is_refused(entry):
    with pytest.raises(UserError, match="is not an ONNX file"):
        external_locations(model_with(REFERENCE + field(13, entry)), Path("m.onnx"))


@pytest.mark.parametrize("backend", ["ort", "torch"])
@pytest.mark.parametrize("at_root", [False, True])
def test_a_deceiving_graph_reads_no_file_that_is_not_listed(at_root, backend, copy, tmp_path):
    evil = "../evil.bin" if at_root else "evil.bin"
    (tmp_path / "evil.bin").write_bytes((copy / DATA).read_bytes())
    (copy / "onnx/evil.bin").write_bytes((copy / DATA).read_bytes())
    refer_to(copy, evil)
    inner = KEY + LISTED
    deceiving = field(3, b"\x6a" + bytes([len(inner)])) + inner + field(2, evil.encode())
    model = onnx.load(str(copy / GRAPH), load_external_data=False)
    tensors = []
    for tensor in model.graph.initializer:
        references = [
            field(13, deceiving) if entry.key == "location" else field(13, entry.SerializeToString())
            for entry in tensor.external_data
        ]
        del tensor.external_data[:]
        tensors.append(field(5, tensor.SerializeToString() + b"".join(references)))
    del model.graph.initializer[:]
    graph = field(7, b"".join(tensors))
    name = "embed_tokens.onnx" if at_root else GRAPH
    (copy / name).write_bytes(model.SerializeToString() + graph)
    parsed = onnx.load(str(copy / name), load_external_data=False)
    assert {entry.value for tensor in parsed.graph.initializer for entry in tensor.external_data} > {evil}
    rehash(copy, name)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["graphs"]["embed_tokens"]["file"] = name
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"embed_tokens\.onnx is not an ONNX file"):
        load(backend, copy)


def test_torch_reads_the_data_files_of_the_graph_alone(copy):
    """Even a listed file is refused that the graph's own bytes, as they were checked, do not name."""
    from onnx.external_data_helper import ExternalDataInfo

    from microvlm.backends.torch_eager import _read_external

    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1])
    tensor.external_data.add(key="location", value="vision_encoder.data")
    with pytest.raises(UserError, match="names weights outside of its bundle"):
        _read_external(ExternalDataInfo(tensor), tensor, BundleFiles(copy), GRAPH)


def nested(depth: int) -> bytes:
    """A tensor inside of so many graphs inside of each other."""
    graph = field(5, REFERENCE)
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


def test_graphs_inside_of_each_other_are_walked_to_the_depth_that_readers_take():
    assert external_locations(nested(30), Path("m.onnx")) == {"embedding.data"}
    onnx.ModelProto.FromString(nested(30))
    with pytest.raises(UserError, match="is not an ONNX file"):
        external_locations(nested(1000), Path("m.onnx"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"location",
        b"\x3a\x7flocation",
        b"\x00" * 9 + b"location",
        b"\x08\x0a",
        b"\x3b\x3c",
        b"\x24\x00\x00\x00ORTM",
    ],
)
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
    for name in set(open_bundle(copy).files) - set(DOCUMENTS):
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


@pytest.mark.posix
def test_an_overwritten_file_whose_time_was_set_back_is_refused_while_mapped(copy):
    runtime = load("ort", copy)
    runtime.embed_tokens(IDS)
    write_in_place(copy / DATA)
    with pytest.raises(UserError, match=r"embedding\.data was changed or replaced"):
        runtime.embed_tokens(IDS)


@pytest.mark.posix
def test_a_backup_of_hard_links_and_other_permissions_do_no_harm(copy, tmp_path, monkeypatch):
    runtime = load("ort", copy)
    expected = runtime.embed_tokens(IDS)
    hashed: list[int] = []
    digest = bundle_format._digest
    monkeypatch.setattr(bundle_format, "_digest", lambda descriptor: hashed.append(1) or digest(descriptor))
    shutil.copytree(copy, tmp_path / "backup", copy_function=os.link)
    assert np.array_equal(runtime.embed_tokens(IDS), expected)
    assert np.array_equal(runtime.embed_tokens(IDS), expected)
    assert len(hashed) == 1
    for path in copy.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    assert np.array_equal(runtime.embed_tokens(IDS), expected)
    runtime.open_ahead()
    runtime.memory_prior()
    load_processor(runtime)
    write_in_place(copy / DATA)
    with pytest.raises(UserError, match=r"embedding\.data was changed or replaced"):
        runtime.embed_tokens(IDS)


@pytest.mark.parametrize("system", ["posix", "windows"])
def test_threads_share_the_descriptor_of_a_file(system, copy, monkeypatch):
    if system == "windows":
        monkeypatch.delattr(os, "pread", raising=False)
    files = BundleFiles(copy)
    names = [DATA, "tokenizer.json"]
    contents = {name: (copy / name).read_bytes() for name in names}

    def read(index: int) -> bool:
        name = names[index % 2]
        files.keep_open(name)
        return files.read(name, 10**9) == contents[name]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))
    assert sorted(files._held) == sorted(names)


@pytest.mark.linux
def test_threads_that_keep_a_file_open_together_open_it_once(copy, monkeypatch):
    files = BundleFiles(copy)
    opened, duplicate = [], os.dup

    def slowly(descriptor: int) -> int:
        time.sleep(0.01)
        opened.append(duplicate(descriptor))
        return opened[-1]

    monkeypatch.setattr(os, "dup", slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: files.keep_open(DATA), range(8)))
    assert len(opened) == 1


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
