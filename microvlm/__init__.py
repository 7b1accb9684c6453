"""MicroVLM: a tiny vision-language model with an episodic memory and ternary weights.

`MicroVLM` is imported on first use, so that a device without torch can import everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microvlm.model import MicroVLM

__all__ = ["MicroVLM"]


def __getattr__(name: str) -> Any:
    if name == "MicroVLM":
        from microvlm.model import MicroVLM

        return MicroVLM
    raise AttributeError(f"module 'microvlm' has no attribute '{name}'")
