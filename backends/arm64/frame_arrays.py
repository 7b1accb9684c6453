"""Converts numpy arrays to the tensors of frames and back."""

from __future__ import annotations

import numpy as np

from microvlm.backends.arm64.frames import ITEM_BYTES, Tensor


def to_tensor(array: np.ndarray) -> Tensor:
    """Copy `array` into a tensor; the caller may change it afterwards. Raises TypeError for another dtype."""
    if array.dtype.name not in ITEM_BYTES:
        raise TypeError(f"frames carry no {array.dtype.name}")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return Tensor(array.dtype.name, array.shape, little.tobytes())


def to_array(tensor: Tensor) -> np.ndarray:
    """View the tensor's bytes as an array; writable where they are."""
    return np.ndarray(tensor.shape, np.dtype(tensor.dtype).newbyteorder("<"), buffer=tensor.data)
