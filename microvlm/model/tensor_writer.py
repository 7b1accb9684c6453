"""Writes a safetensors file tensor by tensor, so that no more than one of them is in memory.

The format is that of `safetensors_header`. The library writes what is in memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 8
_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8",
    torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


class LazyTensor(NamedTuple):
    """A tensor of known shape and dtype that is read or made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def converted(
        self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None
    ) -> LazyTensor:
        """The tensor after `function`, which keeps its dtype, and its shape where none is given."""
        return LazyTensor(shape or self.shape, self.dtype, lambda: function(self.read()))


def write_lazily(
    tensors: Mapping[str, LazyTensor],
    path: Path,
    metadata: Mapping[str, str],
    written: Callable[[str], None] | None = None,
) -> None:
    """Write `tensors`, widest elements first as the library does; `written` gets the name of each. Raises OSError."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in order:
            expected = tensors[name]
            value = expected.read().detach().contiguous()
            if value.shape != expected.shape or value.dtype != expected.dtype:
                raise ValueError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, and was announced as {expected}"
                )
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            if written is not None:
                written(name)
