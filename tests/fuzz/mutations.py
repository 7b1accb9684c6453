"""Mutations of files: of bytes, of a JSON document's values and structure, and of a safetensors file's header.

Every function takes a `random.Random`, so that a seed names a mutant.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

INTERESTING_BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B)
INTERESTING_NUMBERS = (
    *(0, 1, -1, 2, 7, 127, 128, 255, 256, 65_535, 10_000, 10**7, 2 * 10**8),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.5, 1e-320, 1e-45, 1e38, 1e300, -1e300),
)
INTERESTING_TEXTS = (
    *("", " ", "\0", "x" * 5000, "\u202egnp.exe", "\x1b[31mred\x1b[0m", "\ud800", "é" * 300, "NaN", "null"),
    *("../../x", "/etc/passwd", "a/../../b", "C:\\x", "<image>", "(a+)+$", "int64", "1" * 400),
)


def mutate_bytes(rng: Random, content: bytes) -> bytes:
    """Apply one to four edits to `content`: other bytes, a cut, a copy, an insertion, a removal or a run of zeros."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            return bytes(rng.randbytes(rng.randrange(16)))
        position = rng.randrange(len(data))
        length = min(len(data) - position, rng.choice((1, 1, 2, 4, 8, 64, 1000)))
        edit = rng.randrange(8)
        if edit == 0:
            data[position] ^= 1 << rng.randrange(8)
        elif edit == 1:
            data[position] = rng.choice(INTERESTING_BYTES)
        elif edit == 2:
            data[position : position + length] = rng.randbytes(length)
        elif edit == 3:
            del data[position:]
        elif edit == 4:
            del data[position : position + length]
        elif edit == 5:
            data[position:position] = data[position : position + length] * rng.choice((1, 2, 100))
        elif edit == 6:
            width = rng.choice((2, 4, 8))
            number = int(rng.choice(INTERESTING_NUMBERS)) % (1 << (8 * width))
            data[position : position + width] = number.to_bytes(width, rng.choice(("little", "big")))
        else:
            data[position : position + length] = bytes(length)
    return bytes(data)


def mutate_json(rng: Random, content: bytes) -> bytes:
    """Change one to three places of a JSON document: a value, a key, an element more or less, or the nesting.

    Content that is no JSON any more is mutated as bytes.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return _write(rng, any_value(rng))
        holder, key = rng.choice(places)
        _edit(rng, holder, key)
    return _write(rng, document)


def mutate_json_or_bytes(rng: Random, content: bytes) -> bytes:
    """`mutate_json` three times of four, else `mutate_bytes`."""
    return mutate_json(rng, content) if rng.random() < 0.75 else mutate_bytes(rng, content)


def mutate_safetensors(rng: Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, its length, or its data."""
    start = 8 + int.from_bytes(content[:8], "little")
    header, body = content[8:start], content[start:]
    edit = rng.randrange(6)
    if edit == 0:
        return mutate_bytes(rng, content)
    if edit == 1:
        return header_length(rng, len(header)) + header + body
    if edit == 2:
        return content[:start] + mutate_bytes(rng, body)
    header = mutate_json(rng, header)
    return len(header).to_bytes(8, "little") + header + body


def header_length(rng: Random, length: int) -> bytes:
    """Eight bytes of a length: wrong by one, or any."""
    number = rng.choice((length - 1, length + 1, 0, *map(int, INTERESTING_NUMBERS)))
    return (number % 2**64).to_bytes(8, "little")


def any_value(rng: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    makers: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice((True, False)),
        lambda: rng.choice(INTERESTING_NUMBERS),
        lambda: rng.choice(INTERESTING_TEXTS),
        lambda: [any_value(rng, depth + 1) for _ in range(rng.randrange(4))] if depth < 4 else [],
        lambda: {rng.choice(INTERESTING_TEXTS): any_value(rng, depth + 1)} if depth < 4 else {},
    ]
    return rng.choice(makers)()


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        holder = pending.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, item in items:
            found.append((holder, key))
            if isinstance(item, dict | list):
                pending.append(item)
    return found


def _edit(rng: Random, holder: Any, key: Any) -> None:
    edit = rng.randrange(7)
    value = holder[key]
    if edit == 0:
        del holder[key]
    elif edit == 1:
        holder[key] = None
    elif edit == 2 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, str(value), [value]))
    elif edit == 3 and isinstance(holder, dict):
        holder[rng.choice((key + "x", *INTERESTING_TEXTS))] = holder.pop(key)
    elif edit == 4:
        holder[key] = rng.choice(([value], {"x": value}, [value, value], [value] * 1000))
    elif edit == 5 and isinstance(holder, list):
        holder.insert(key, value)
    else:
        holder[key] = any_value(rng)


def _write(rng: Random, document: Any) -> bytes:
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.01:
        text = text.replace("null", "[" * 100_000, 1)
    if rng.random() < 0.02:
        text = text.replace("1", "9" * 5000, 1)
    return text.encode("utf-8", "surrogatepass")
