"""Initial values of parameters, which are neither drawn nor computed while a model is built empty.

A model that is about to be loaded is built on torch's meta device (`empty_modules`): all its values come from a file.
There torch would still import its compiler, which takes a second and 80 MB, for a draw or a product of no values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def empty_modules() -> torch.device:
    """A context in which modules are built with shapes and dtypes alone, for `load_strictly` with `assign`."""
    return torch.device("meta")


def is_empty() -> bool:
    """Whether modules are built without values: inside `empty_modules`."""
    return torch.get_default_device().type == "meta"


def normal(*shape: int, std: float) -> Tensor:
    """float32 [*shape], drawn from N(0, std^2) by torch's generator; without values inside `empty_modules`."""
    return torch.empty(shape) if is_empty() else torch.randn(shape) * std


def computed(*shape: int, values: Callable[[], Tensor]) -> Tensor:
    """float32 [*shape], the result of `values()`; without values inside `empty_modules`."""
    return torch.empty(shape) if is_empty() else values()
