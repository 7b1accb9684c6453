"""Initializers of an ONNX file, and the data files that it refers to, read from its protobuf wire format without onnx.

Fields used (onnx.proto): ModelProto.graph 7; GraphProto.initializer 5; TensorProto.dims 1, data_type 2, float_data 4,
int32_data 5, int64_data 7, name 8, raw_data 9, external_data 13; StringStringEntryProto.key 1, value 2. `_CHILDREN`
lists the fields that lead to a tensor.
"""

from __future__ import annotations

import os
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
_MAX_DEPTH = 100
"""Messages inside of each other, the limit of protobuf's own readers."""
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
        content = path.read_bytes()
        return [
            _initializer(content, *tensor)
            for field, kind, *graph in _fields(content, 0, len(content))
            if field == 7 and kind == _LENGTH
            for number, kind, *tensor in _fields(content, *graph)
            if number == 5 and kind == _LENGTH
        ]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy or export the bundle again.") from None
    except (OSError, ValueError, IndexError, KeyError):
        raise UserError(f"{path} is not an ONNX file: copy or export the bundle again.") from None


def external_locations(content: bytes, path: Path) -> set[str]:
    """The files that tensors of a model lie in, wherever in the model they are, by the names that the model has.

    `path` names the file in errors. Raises UserError when it is not an ONNX file, or encoded so that readers could
    take different names from it.
    """
    try:
        if not any(field == 7 and kind == _LENGTH for field, kind, *_ in _fields(content, 0, len(content))):
            raise ValueError("no graph")
        locations: dict[bytes, str | None] = {}
        _walk_locations(content, 0, len(content), "model", 0, locations)
        return {location for location in locations.values() if location is not None}
    except (ValueError, IndexError):
        raise UserError(f"{path} is not an ONNX file: copy or export the bundle again.") from None


def _walk_locations(
    content: bytes, start: int, end: int, message: str, depth: int, locations: dict[bytes, str | None]
) -> None:
    """Fill `locations`, entry of external_data -> its location, from the message at `start`.

    Only messages that hold the eight letters of the key are entered: without these they hold no location.
    """
    if message == "entry":
        entry = content[start:end]
        if entry not in locations:
            locations[entry] = _location(content, start, end)
        return
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    children = _CHILDREN[message]
    key = content.find(_LOCATION, start, end)
    if key < 0:
        return
    for field, kind, first, last in _fields(content, start, end):
        if kind == _LENGTH and key < last:
            child = children.get(field)
            if child is not None:
                _walk_locations(content, first, last, child, depth + 1, locations)
            key = content.find(_LOCATION, last, end)
            if key < 0:
                return


def _location(content: bytes, start: int, end: int) -> str | None:
    """The location in an entry of external_data; None in an entry with another key.

    Raises ValueError for an entry with another field than one key and one value: no writer makes one, and readers
    that take the first or the last of two would find different files.
    """
    fields: dict[int, bytes] = {}
    for field, kind, first, last in _fields(content, start, end):
        if kind != _LENGTH or field not in (1, 2) or field in fields:
            raise ValueError("no entry of a key and a value")
        fields[field] = content[first:last]
    return _text(fields.get(2, b"")) if fields.get(1) == _LOCATION else None


def _text(value: bytes) -> str:
    """A name as Python's file functions take it. Raises ValueError for one that no file has."""
    if b"\0" in value:
        raise ValueError(value)
    return os.fsdecode(value)


def _initializer(content: bytes, start: int, end: int) -> Initializer:
    name, data_type, dims, location = "", 0, [], None
    for field, kind, first, last in _fields(content, start, end):
        if field == 1:
            dims += [first] if kind == _VARINT else list(_packed_varints(content, first, last))
        elif field == 2 and kind == _VARINT:
            data_type = first
        elif field == 8 and kind == _LENGTH:
            name = content[first:last].decode()
        elif field == 13 and kind == _LENGTH:
            place = _location(content, first, last)
            location = location if place is None else place
    nbytes, dtype = _ELEMENTS[data_type]
    for length in dims:
        nbytes *= length
    return Initializer(name, tuple(dims), dtype, nbytes, location)


def _fields(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, where its bytes start, where they end) of the message at `start`.

    Of a varint its value stands in place of its start. Raises ValueError or IndexError on anything that writers of
    protobuf do not write, such as groups and numbers with more bytes than they need.
    """
    position = start
    while position < end:
        tag = content[position]
        if tag < 128:
            position += 1
        else:
            tag, position = _varint(content, position, 32)
        kind = tag & 7
        if tag < 8:
            raise ValueError("field 0")
        if kind == _VARINT:
            value, position = _varint(content, position, 64)
            if position > end:
                raise ValueError("a field runs over the end")
            yield tag >> 3, kind, value, position
            continue
        if kind == _LENGTH:
            length, position = _varint(content, position, 31)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        first, position = position, position + length
        if position > end:
            raise ValueError("a field runs over the end")
        yield tag >> 3, kind, first, position


def _packed_varints(content: bytes, start: int, end: int) -> Iterator[int]:
    position = start
    while position < end:
        value, position = _varint(content, position, 64)
        yield value


def _varint(content: bytes, position: int, bits: int) -> tuple[int, int]:
    """An unsigned number of at most `bits` bits, and the position behind it."""
    value = content[position]
    position += 1
    if value < 128:
        return value, position
    value, shift, byte = value & 127, 7, 128
    while byte >= 128:
        byte = content[position]
        value |= (byte & 127) << shift
        position += 1
        shift += 7
        if shift > 70:
            raise ValueError("a varint runs over ten bytes")
    if byte == 0 or value >> bits:
        raise ValueError("a varint is longer than its value needs, or than its field allows")
    return value, position
