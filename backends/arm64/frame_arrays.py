"""numpy arrays as the tensors of frames."""

from __future__ import annotations

import numpy as np

from microvlm.backends.arm64.frames import ITEM_BYTES, Tensor


def to_tensor(array: np.ndarray) -> Tensor:
    """A copy, so that the caller may go on changing `array`. Raises TypeError for a dtype that frames don't carry."""
    if array.dtype.name not in ITEM_BYTES:
        raise TypeError(f"frames carry no {array.dtype.name}")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return Tensor(array.dtype.name, array.shape, little.tobytes())


def to_array(tensor: Tensor) -> np.ndarray:
    """A view of the tensor's bytes; writable where they are."""
    return np.ndarray(tensor.shape, np.dtype(tensor.dtype).newbyteorder("<"), buffer=tensor.data)
