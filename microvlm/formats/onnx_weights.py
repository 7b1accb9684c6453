"""Initializers of an ONNX file, and the data files that it refers to, read from its protobuf wire format without onnx.

Fields used (onnx.proto): ModelProto.graph 7; GraphProto.initializer 5; TensorProto.dims 1, data_type 2, float_data 4,
int32_data 5, int64_data 7, name 8, raw_data 9, external_data 13; StringStringEntryProto.key 1, value 2. `_CHILDREN`
lists the fields that lead to a tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from microvlm.errors import UserError

# TensorProto.DataType -> bytes of one element, and its kind as `weight_shapes.TensorType` has it.
_ELEMENTS = {
    1: (4, "float"), 2: (1, "uint8"), 3: (1, "int8"), 4: (2, "uint16"), 5: (2, "int16"), 6: (4, "int32"),
    7: (8, "int64"), 9: (1, "bool"), 10: (2, "float"), 11: (8, "float"), 12: (4, "uint32"), 13: (8, "uint64"),
    16: (2, "float"),
}  # fmt: skip
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_LOCATION = b"location"
_LOCATION_ENTRY = re.compile(rb"\x6a([\x0d-\x7f])\x0a\x08location\x12([\x01-\x73])", re.DOTALL)
"""An entry of external_data as writers of protobuf encode it: its length, the key, and the value's length."""
_ENTRY_BYTES = 12
"""Those of such an entry beside the value."""
# Message -> field -> the message in it, for every way from a model to the external data of a tensor.
_CHILDREN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


class Initializer(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: str
    """`float` of any width, or numpy's name of a dtype."""
    nbytes: int
    location: str | None
    """The file beside the graph that holds the bytes; None when they are in the graph."""


def read_initializers(path: Path) -> list[Initializer]:
    """Raises UserError when the file is missing or is not an ONNX file."""
    try:
        return [
            _initializer(tensor)
            for field, graph in _fields(memoryview(path.read_bytes()))
            if field == 7 and isinstance(graph, memoryview)
            for number, tensor in _fields(graph)
            if number == 5 and isinstance(tensor, memoryview)
        ]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy or export the bundle again.") from None
    except (OSError, ValueError, IndexError, KeyError):
        raise UserError(f"{path} is not an ONNX file: copy or export the bundle again.") from None


def external_locations(content: bytes, path: Path) -> set[str]:
    """The files that tensors of a model lie in, wherever in the model they are, by the names that the model has.

    `path` names the file in errors. Raises UserError when it is not an ONNX file.
    """
    try:
        locations = _usual_locations(content)
        return set(_walk_locations(memoryview(content), "model")) if locations is None else locations
    except (ValueError, IndexError, RecursionError):
        raise UserError(f"{path} is not an ONNX file: copy or export the bundle again.") from None


def _usual_locations(content: bytes) -> set[str] | None:
    """The locations where each is in an entry as writers of protobuf encode it; None where any is not.

    Every reference has the eight letters of the key, so that they can be counted: the walk takes ten times as long. It
    finds more only in a model that was encoded to deceive, whose author could as well have listed the file.
    """
    rest, entries, locations = content.count(_LOCATION), set(), set()
    for match in _LOCATION_ENTRY.finditer(content):
        entry = content[match.start() : match.end() + match[2][0]]
        if entry in entries:
            continue
        if match[1][0] != _ENTRY_BYTES + match[2][0]:
            return None
        entries.add(entry)
        locations.add(_text(entry[_ENTRY_BYTES + 2 :]))
        rest -= content.count(entry)
        if rest <= 0:
            break
    return locations if rest == 0 else None


def _walk_locations(message: memoryview, kind: str) -> Iterator[str]:
    if kind == "entry":
        fields = dict(_fields(message))
        value = fields.get(2, b"")
        if fields.get(1) == _LOCATION and not isinstance(value, int):
            yield _text(bytes(value))
        return
    for field, value in _fields(message):
        child = _CHILDREN[kind].get(field)
        if child is not None and not isinstance(value, int) and _LOCATION in bytes(value):
            yield from _walk_locations(memoryview(value), child)


def _text(value: bytes) -> str:
    """A name as Python's file functions take it. Raises ValueError for one that no file has."""
    if b"\0" in value:
        raise ValueError(value)
    return os.fsdecode(value)


def _initializer(tensor: memoryview) -> Initializer:
    name, data_type, dims, location = "", 0, [], None
    for field, value in _fields(tensor):
        if field == 1:
            dims += [value] if isinstance(value, int) else list(_packed_varints(value))
        elif field == 2 and isinstance(value, int):
            data_type = value
        elif field == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif field == 13 and isinstance(value, memoryview):
            entry = {
                number: bytes(text).decode()
                for number, text in _fields(value)
                if isinstance(text, memoryview)
            }
            location = entry.get(2) if entry.get(1) == "location" else location
    nbytes, kind = _ELEMENTS[data_type]
    for length in dims:
        nbytes *= length
    return Initializer(name, tuple(dims), kind, nbytes, location)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, integer or bytes) of one message. Raises ValueError or IndexError on anything else."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == _LENGTH:
            length, position = _varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + length > len(data):
            raise ValueError("a field runs over the end")
        yield tag >> 3, data[position : position + length]
        position += length


def _packed_varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a varint runs over ten bytes")
