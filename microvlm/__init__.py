"""MicroVLM: a tiny vision-language model with an episodic memory and ternary weights.

`MicroVLM` is imported on first use, so that a device without torch can import everything else.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microvlm.model.microvlm import MicroVLM

__all__ = ["MicroVLM"]

__version__ = "0.1.0"
"""pyproject.toml reads it from here: a checkout that was never installed has a version too."""

# ONNX Runtime's official builds since 1.29 report to their maker, by threads, a database in the user's cache and the
# network, from the moment they are imported: only this variable, set before, keeps all of it away (its Privacy.md).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    if name == "MicroVLM":
        from microvlm.model.microvlm import MicroVLM

        return MicroVLM
    raise AttributeError(f"module 'microvlm' has no attribute '{name}'")
