"""Frames between host and device: every frame survives the pipe, and other bytes are refused with a sentence."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest

from microvlm.backends.arm64.frame_arrays import to_array, to_tensor
from microvlm.backends.arm64.frames import (
    GREETING,
    VERSION,
    ConnectionLost,
    FrameError,
    Tensor,
    VersionMismatch,
    read_frame,
    read_greeting,
    write_frame,
)

ARRAYS = (
    np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2],
    np.array(-7, np.int64),
    np.zeros((3, 0, 5), np.float32),
    np.array([True, False]),
    np.arange(256, dtype=np.uint8),
)


def frame(header: object, body: bytes = b"", magic: bytes = b"MVLM", version: int = VERSION) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<4sIIQ", magic, version, len(text), len(body)) + text + body


def parse_frame(data: bytes) -> tuple[dict, list[Tensor]]:
    return read_frame(io.BytesIO(data))


def frame_bytes(header: dict, *arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, header, tuple(map(to_tensor, arrays)))
    return stream.getvalue()


def test_a_frame_carries_its_header_and_every_array_bit_for_bit() -> None:
    header, tensors = parse_frame(frame_bytes({"id": 3, "do": "run"}, *ARRAYS))
    assert header == {"id": 3, "do": "run"}
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        parsed = to_array(tensor)
        assert (parsed.dtype, parsed.shape, parsed.tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        )


def test_frames_follow_one_another_on_a_stream() -> None:
    stream = io.BytesIO(frame_bytes({"id": 1}, ARRAYS[0]) + frame_bytes({"id": 2}))
    assert [read_frame(stream)[0]["id"] for _ in range(2)] == [1, 2]
    with pytest.raises(ConnectionLost):
        read_frame(stream)


def test_a_frame_cut_anywhere_is_a_lost_connection() -> None:
    frame = frame_bytes({"id": 1}, ARRAYS[0])
    for length in range(len(frame)):
        with pytest.raises(ConnectionLost):
            parse_frame(frame[:length])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"Welcome to the Raspberry Pi! Last login: never", "began with b'Welc'"),
        (frame({"tensors": []}, version=9), "protocol version 9"),
        (struct.pack("<4sIIQ", b"MVLM", VERSION, 1 << 31, 0), "too long"),
        (struct.pack("<4sIIQ", b"MVLM", VERSION, 2, 1 << 60), "too long"),
        (frame(b"{]"), "not a JSON object"),
        (frame(b"\xff\xfe"), "not a JSON object"),
        (frame(b"[" * 100_000), "not a JSON object"),
        (frame([1, 2]), "not a JSON object"),
        (frame({"id": 1}), "not a JSON object"),
        (frame({"tensors": [["object", [1]]]}, b"12345678"), "not a JSON object"),
        (frame({"tensors": [[["float32"], [1]]]}, b"1234"), "not a JSON object"),
        (frame({"tensors": [["float32", [-1, -1]]]}, b"1234"), "not a JSON object"),
        (frame({"tensors": [["float32", [1.0]]]}, b"1234"), "not a JSON object"),
        (frame({"tensors": [["float32", [True]]]}, b"1234"), "not a JSON object"),
        (frame({"tensors": [["float32", [1 << 40, 0]]]}, b""), "not a JSON object"),
        (frame({"tensors": [["float32", [1] * 17]]}, b"1234"), "not a JSON object"),
        (frame({"tensors": [["float32", [2**31] * 100_000]]}, b"1234"), "not a JSON object"),
        (frame({"tensors": [["float32", [2**31, 2**31, 0]]]}, b""), "not a JSON object"),
        (frame({"tensors": [["float32", [2]]]}, b"1234"), "need 8 bytes and its body has 4"),
        (frame({"tensors": []}, b"1"), "need 0 bytes and its body has 1"),
    ],
)
def test_bytes_that_are_no_frame_are_refused_before_the_body_is_read(data: bytes, sentence: str) -> None:
    with pytest.raises(FrameError) as error:
        parse_frame(data)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_random_damage_never_ends_in_another_error() -> None:
    random = np.random.default_rng(0)
    frame = bytearray(frame_bytes({"id": 1, "do": "run", "inputs": [None]}, ARRAYS[0]))
    ends = {"read": 0, "refused": 0}
    for _ in range(2000):
        damaged_frame = bytearray(frame)
        for place in random.integers(0, len(frame), random.integers(1, 4)):
            damaged_frame[place] = random.integers(0, 256)
        try:
            for tensor in parse_frame(bytes(damaged_frame))[1]:
                to_array(tensor)
            ends["read"] += 1
        except (ConnectionLost, FrameError):
            ends["refused"] += 1
    assert all(ends.values())


def test_the_greeting_is_found_behind_what_a_login_shell_prints() -> None:
    stream = io.BytesIO(b"Welcome!\r\n\nno mail\n" + GREETING + b"\nMVLM")
    assert read_greeting(stream) == b"Welcome!\r\n\nno mail\n"
    assert stream.read() == b"MVLM"


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (b"bash: python3: command not found\n", ConnectionLost),
        (b"yes\n" * 50_000, FrameError),
        (b"no end of a line " * 10_000, FrameError),
    ],
)
def test_without_a_greeting_what_was_printed_is_in_the_error(output: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        read_greeting(io.BytesIO(output))
    assert caught.value.args[0].startswith(output[:4])


@pytest.mark.parametrize("line", [b"microvlm-worker 1\n", b"microvlm-worker 10\r\n"])
def test_a_greeting_of_another_version_is_refused_at_once(line: bytes) -> None:
    stream = io.BytesIO(b"Welcome!\n" + line + b"MVLM")
    with pytest.raises(
        VersionMismatch, match=r"speaks version \d+ of the protocol and this side version 2: .*remove"
    ):
        read_greeting(stream)
    assert stream.read() == b"MVLM"
    assert (
        read_greeting(io.BytesIO(b"microvlm-worker is here\n" + GREETING + b"\n"))
        == b"microvlm-worker is here\n"
    )


def test_an_array_of_an_unsupported_dtype_raises_type_error() -> None:
    with pytest.raises(TypeError, match="float64"):
        to_tensor(np.zeros(2))
