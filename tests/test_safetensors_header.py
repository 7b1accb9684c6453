"""The header of a safetensors file is typed and bounded, and agrees with the file before any data is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from microvlm.errors import UserError
from microvlm.formats.headers.safetensors_header import TensorHeader, read_header

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


def sentence(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_header(path, "copy it again")
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.endswith(": copy it again.")
    assert text.isprintable()
    assert len(text) < len(str(path)) + 200
    return text


def test_a_file_of_the_library_is_read_as_the_library_reads_it(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "half": torch.zeros(3, 2, dtype=torch.float16),
        "none": torch.zeros(0, 7),
        "one": torch.tensor(2.0),
        "packed": torch.arange(5, dtype=torch.uint8),
        "wide": torch.zeros(2, dtype=torch.bfloat16),
    }
    save_file(tensors, path, metadata={"layers": "{}"})
    header = read_header(path, "copy it again")
    assert header.metadata == {"layers": "{}"}
    assert {name: entry.shape for name, entry in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    kinds = {name: entry.kind for name, entry in header.tensors.items()}
    assert kinds == {**dict.fromkeys(("half", "none", "one", "wide"), "float"), "packed": "uint8"}
    packed = header.tensors["packed"]
    assert path.read_bytes()[packed.start :][: packed.nbytes] == bytes(range(5))


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ({"a": {**ENTRY, "shape": [2, 4]}}, "'a' are not those of its dtype and shape"),
        ({"a": {**ENTRY, "dtype": "F16"}}, "'a' are not those of its dtype and shape"),
        ({"a": {**ENTRY, "dtype": "F31"}}, "'a' are not those of its dtype and shape"),
        ({"a": {**ENTRY, "dtype": "F4"}}, "'a' are not those of its dtype and shape"),
        ({"a": {**ENTRY, "shape": [2**40] * 16}}, "'a' are not those of its dtype and shape"),
        ({"a": {**ENTRY, "shape": [1] * 17}}, "shape' must be a list of length <= 16"),
        ({"a": {**ENTRY, "shape": [-2, -3]}}, "must be a whole number >= 0"),
        ({"a": {**ENTRY, "shape": [10**19]}}, "must be a whole number <= 9007199254740992"),
        ({"a": {**ENTRY, "shape": None}}, "shape' must be a list, not null"),
        ({"a": {**ENTRY, "shape": 6}}, "shape' must be a list, not a whole number"),
        ({"a": {**ENTRY, "dtype": None}}, "dtype' must be text, not null"),
        ({"a": {**ENTRY, "data_offsets": [0, 32]}}, "'a' are not those of its dtype and shape"),
        ({"a": {**ENTRY, "data_offsets": [8, 32]}}, "'a' are not those of its dtype and shape"),
        ({"a": {**ENTRY, "data_offsets": [24, 0]}}, "'a' are not those of its dtype and shape"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, "data_offsets' must be a list of length 2"),
        ({"a": ENTRY, "b": ENTRY}, "'b' are not those of its dtype and shape"),
        ({}, "has 34 bytes and 10 by its header"),
        ({"a": {"dtype": "F32", "shape": [6]}}, "data_offsets' is missing"),
        ({"a": []}, "must be an object, not a list"),
        ({"__metadata__": {"layers": {}}, "a": ENTRY}, "must be text, not an object"),
        ({"__metadata__": None, "a": ENTRY}, "must be an object, not null"),
        ([], "must be an object, not a list"),
        (b"{", "is not valid JSON"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer value out of range"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_a_sentence(header, part, tmp_path):
    assert part in sentence(write(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 8, (10**11).to_bytes(8, "little") + b"{}", bytes(7)]
)
def test_a_length_beyond_the_file_is_a_sentence(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert "is damaged or not a safetensors file" in sentence(path)


def test_a_header_longer_than_the_library_reads_is_refused_unread(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(10**10)
    assert "is damaged or not a safetensors file" in sentence(path)


def test_a_missing_file_is_the_callers_and_a_folder_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "a.safetensors", "copy it again")
    with pytest.raises(UserError, match="is a folder"):
        read_header(tmp_path, "copy it again")


@given(
    entry=st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "BF16", "I64", "x", None]),
            "shape": st.lists(st.integers(-1, 9) | st.none(), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
        }
    ),
    size=st.integers(0, 40),
)
def test_what_is_accepted_the_library_accepts_too(entry, size, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp() / "a.safetensors", {"a": entry}, bytes(size))
    try:
        header = read_header(path, "copy it again")
    except UserError:
        return
    assert isinstance(header.tensors["a"], TensorHeader)
    try:
        with safe_open(path, framework="pt") as file:
            assert list(file.get_tensor("a").shape) == entry["shape"]
    except SafetensorError as error:
        raise AssertionError(entry) from error
