"""manifest.json is read as a typed record: whatever a key holds, it is a right value or one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvlm.errors import UserError
from microvlm.formats.lowered_layer import LoweredLayer
from microvlm.formats.manifest import (
    BUNDLE_FORMAT,
    FileEntry,
    GraphEntry,
    Manifest,
    TensorEntry,
    read_manifest,
    save_manifest,
)

ENTRY = {"bytes": 5, "sha256": "0" * 64}
DOCUMENT: dict[str, Any] = {
    "format": BUNDLE_FORMAT,
    "name": "tiny",
    "fingerprint": "0123456789abcdef",
    "bits": 1.58,
    "packing": "2bit",
    "embedding_bits": 8,
    "bits_per_weight": {"ternary": 2.0, "other": None},
    "versions": {"microvlm": "0.1.0", "opset": 23},
    "graphs": {
        "embed_tokens": {
            "file": "onnx/embed_tokens.onnx",
            "name": "embed_tokens",
            "method": "embed",
            "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
            "outputs": [{"name": "inputs_embeds", "dtype": "float32", "shape": ["batch", "sequence", 64]}],
        }
    },
    "lowered": {
        "decoder.a": {"kind": "ternary2x4", "rows": 8, "columns": 4, "scale": 1, "bias": False},
        "embedding": {"kind": "half-embedding", "rows": 8, "columns": 4},
    },
    "files": {"onnx/embed_tokens.onnx": ENTRY},
    "vocabulary": {"tokens": 10, "of": 20, "merges": 3},
    "training": {"recipe": {"stages": []}},
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(path: tuple, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


def read(folder: Path, document: Any) -> Manifest:
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return read_manifest(folder)


def sentence(folder: Path, document: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, document)
    text = str(caught.value)
    assert text.startswith(str(folder / "manifest.json"))
    text = text.removeprefix(str(folder))
    assert text.isprintable()
    assert len(text) < 300
    return text


def test_a_manifest_is_written_as_it_was_read(tmp_path):
    manifest = read(tmp_path, DOCUMENT)
    save_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_text() == json.dumps(DOCUMENT, indent=1) + "\n"
    assert manifest.lowered["embedding"] == LoweredLayer(kind="half-embedding", rows=8, columns=4)
    assert manifest.files == {"onnx/embed_tokens.onnx": FileEntry(5, "0" * 64)}
    tensor = TensorEntry("input_ids", "int64", ("batch", "sequence"))
    entry = manifest.graphs["embed_tokens"]
    assert isinstance(entry, GraphEntry)
    assert entry.inputs == (tensor,)


def test_keys_of_a_later_version_of_the_same_format_are_skipped(tmp_path):
    document = changed(("files", "onnx/embed_tokens.onnx"), {**ENTRY, "mode": 7})
    document["flux"] = {"deep": [1, 2]}
    assert read(tmp_path, document) == read(tmp_path, DOCUMENT)


@pytest.mark.parametrize("name", ["onnx/a.ort", "onnx/a.ONNX", "a.onnx.ort", "onnx/a", "a.onnx.json"])
def test_a_graph_in_a_file_of_another_format_is_refused(name, tmp_path):
    document = copy.deepcopy(DOCUMENT)
    document["graphs"]["embed_tokens"]["file"] = name
    document["files"][name] = ENTRY
    assert f"'{name}', the graph 'embed_tokens', does not end in .onnx" in sentence(tmp_path, document)


def test_a_newer_format_may_have_any_structure(tmp_path):
    for document in ({"format": 3}, {"format": 10**30, "files": 7}):
        assert "newer microvlm; upgrade" in sentence(tmp_path, document)
    assert "older microvlm" in sentence(tmp_path, {"format": 1, "graphs": None})


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../a", "a/../b", "a/..", "/etc/passwd", "a//b", "a/", "C:/a", "C:a", "..\\a", "\\\\host\\a",
        "a\0b", "a\nb", "\x1b[31m", "a/. ./b", ".. /a", "a" * 251, "x:stream", "a\u202eb",
    ],
)  # fmt: skip
def test_a_name_that_leaves_the_bundle_on_any_system_is_refused(name, tmp_path):
    text = sentence(tmp_path, changed(("files", name), ENTRY))
    assert "is no path of a file inside the bundle" in text


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        (("format",), None, "'format' must be a whole number, not null"),
        (("format",), "2", "'format' must be a whole number, not text"),
        (("graphs",), None, "'graphs' must be an object, not null"),
        (("graphs", "embed_tokens"), [], "'graphs[...]' must be an object, not a list"),
        (("graphs", "embed_tokens", "file"), "onnx/b.onnx", "'files' lacks 'onnx/b.onnx'"),
        (("graphs", "embed_tokens", "inputs", 0, "shape", 0), -1, "shape[0]' must be a whole number >= 0"),
        (("graphs", "embed_tokens", "inputs", 0, "shape", 0), 10**12, "must be a whole number <= 2147483647"),
        (("graphs", "embed_tokens", "inputs", 0, "shape", 0), 1.5, "must be a whole number or text, not a number"),
        (("graphs", "embed_tokens", "inputs", 0, "name"), {}, "inputs[0].name' must be text, not an object"),
        (("lowered", "decoder.a", "rows"), 0, "rows' must be a whole number >= 1"),
        (("lowered", "decoder.a", "columns"), 2**40, "columns' must be a whole number <= 2147483647"),
        (("lowered", "decoder.a", "kind"), None, "kind' must be text, not null"),
        (("lowered", "decoder.a", "bias"), 1, "bias' must be true or false or null, not a whole number"),
        (("files", "onnx/embed_tokens.onnx", "bytes"), -1, "bytes' must be a whole number >= 0"),
        (("files", "onnx/embed_tokens.onnx", "bytes"), 2**60, "bytes' must be a whole number <= 9007199254740992"),
        (("files", "onnx/embed_tokens.onnx", "sha256"), "ff", "sha256' must be text matching regex"),
        (("bits",), 99, "'bits' must be a whole number <= 64"),
        (("embedding_bits",), "8", "'embedding_bits' must be a number or null, not text"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_key(path, value, part, tmp_path):
    assert part in sentence(tmp_path, changed(path, value))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is not valid JSON"),
        ("[]", "must be an object, not a list"),
        ('{"format": 2, "bits": NaN}', "is not valid JSON"),
        ('{"format": ' + "9" * 5000 + "}", "integer value out of range"),
        ('{"format": 2, "training": ' + '{"a":' * 100_000, "is nested too deeply"),
        ('{"format": 2}', "is missing"),
    ],
)
def test_what_is_no_manifest_is_told(text, part, tmp_path):
    assert part in sentence(tmp_path, text)


@given(path=st.sampled_from(sorted(places(DOCUMENT), key=str)), value=VALUES)
def test_any_value_in_place_of_any_other_is_a_record_or_a_sentence(path, value, tmp_path_factory):
    document = changed(path, value)
    folder = tmp_path_factory.getbasetemp()
    try:
        manifest = read(folder, document)
    except UserError:
        sentence(folder, document)
    else:
        assert read(folder, msgspec.to_builtins(manifest)) == manifest
