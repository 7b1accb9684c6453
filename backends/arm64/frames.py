"""Reads and writes the frames that host and device exchange over a pipe.

Imports the standard library alone: this source is also sent to a device on which microvlm is not installed yet.

    offset  bytes
    0       4      b"MVLM"
    4       4      protocol version, u32
    8       4      length of the header, u32
    12      8      length of the body, u64
    20      ..     header: a JSON object in UTF-8; its "tensors" lists [dtype, shape] of each tensor in the body
    ..      ..     body: the tensors' bytes back to back, C order

All integers and tensors are little-endian. Before its first frame a worker writes a line with GREETING, because a
login shell may print other lines first.
"""

from __future__ import annotations

import json
import math
import re
import struct
from typing import IO, Any, NamedTuple

VERSION = 2
GREETING = b"microvlm-worker %d" % VERSION
_GREETINGS = re.compile(rb"microvlm-worker (\d{1,9})")
_PREFIX = struct.Struct("<4sIIQ")
_MAGIC = b"MVLM"
ITEM_BYTES = {"float32": 4, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
LONGEST_HEADER = 1 << 22
LONGEST_BODY = 1 << 31
MOST_AXES = 16
LONGEST_NOISE = 1 << 16
"""Most bytes that a device may print before its greeting."""


class FrameError(Exception):
    """Received bytes are not a frame of this protocol; the message is one sentence."""


class VersionMismatch(FrameError):
    """A worker greeted in another version of this protocol; the message is one sentence."""


class ConnectionLost(Exception):
    """The other side closed the connection or ended."""


class Tensor(NamedTuple):
    """One array, without numpy."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


def write_frame(stream: IO[bytes], header: dict[str, Any], tensors: tuple[Tensor, ...] = ()) -> None:
    """Write one frame. Raises ConnectionLost where the other side reads no more."""
    descriptions = [[tensor.dtype, list(tensor.shape)] for tensor in tensors]
    text = json.dumps({**header, "tensors": descriptions}, allow_nan=False).encode()
    body = sum(len(memoryview(tensor.data).cast("B")) if tensor.data else 0 for tensor in tensors)
    try:
        _write(stream, _PREFIX.pack(_MAGIC, VERSION, len(text), body) + text)
        for tensor in tensors:
            if tensor.data:
                _write(stream, memoryview(tensor.data).cast("B"))
    except (OSError, ValueError):
        raise ConnectionLost from None


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], list[Tensor]]:
    """Read one frame -> header, tensors. Raises ConnectionLost at the end of the stream, FrameError for other bytes."""
    prefix = read_exactly(stream, _PREFIX.size)
    magic, version, header_bytes, body_bytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise FrameError(f"a frame began with {bytes(magic)!r}: something else writes into the connection.")
    if version != VERSION:
        raise FrameError(f"a frame is of protocol version {version} and this side speaks {VERSION}.")
    if header_bytes > LONGEST_HEADER or body_bytes > LONGEST_BODY:
        raise FrameError(f"a frame of {header_bytes} and {body_bytes} bytes is too long to be one.")
    try:
        header = json.loads(read_exactly(stream, header_bytes))
        descriptions = header.pop("tensors")
        shapes = [(dtype, tuple(shape)) for dtype, shape in descriptions]
        sizes = [_byte_count(dtype, shape) for dtype, shape in shapes]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FrameError("a frame's header is not a JSON object that describes its tensors.") from None
    if sum(sizes) != body_bytes:
        raise FrameError(f"a frame's tensors need {sum(sizes)} bytes and its body has {body_bytes}.")
    try:
        tensors = [
            Tensor(dtype, shape, read_exactly(stream, size))
            for (dtype, shape), size in zip(shapes, sizes, strict=True)
        ]
    except MemoryError:
        raise FrameError(f"a frame's body of {body_bytes} bytes does not fit into memory.") from None
    return header, tensors


def read_greeting(stream: IO[bytes]) -> bytes:
    """Read up to the greeting -> the bytes printed before it.

    Raises ConnectionLost or FrameError, with these bytes in `args`, and VersionMismatch with a sentence.
    """
    noise = bytearray()
    line = bytearray()
    while len(noise) + len(line) < LONGEST_NOISE:
        # Byte by byte: the bytes after the greeting belong to the first frame.
        try:
            byte = read_exactly(stream, 1)
        except ConnectionLost:
            raise ConnectionLost(bytes(noise + line)) from None
        if byte != b"\n":
            line += byte
        elif line.strip() == GREETING:
            return bytes(noise)
        elif other := _GREETINGS.fullmatch(line.strip()):
            # Without this error both sides would wait for each other.
            raise VersionMismatch(
                f"the worker speaks version {int(other[1])} of the protocol and this side version {VERSION}: use the "
                "same microvlm on both sides, or remove the device's ~/.cache/microvlm/device."
            )
        else:
            noise += line + byte
            line.clear()
    raise FrameError(bytes(noise + line))


def read_exactly(stream: IO[bytes], count: int) -> bytearray:
    """Read `count` bytes from an unbuffered stream. Raises ConnectionLost where it ends earlier."""
    data = bytearray(count)
    view, offset = memoryview(data), 0
    while offset < count:
        try:
            count_read = stream.readinto(view[offset:])  # type: ignore[attr-defined]
        except (OSError, ValueError):
            count_read = 0
        if not count_read:
            raise ConnectionLost
        offset += count_read
    return data


def _byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    if len(shape) > MOST_AXES or not all(
        type(length) is int and 0 <= length <= LONGEST_BODY for length in shape
    ):
        raise ValueError(shape)
    if 0 in shape and math.prod(length or 1 for length in shape) > LONGEST_BODY:  # numpy refuses these, too
        raise ValueError(shape)
    return ITEM_BYTES[dtype] * math.prod(shape)


def _write(stream: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
