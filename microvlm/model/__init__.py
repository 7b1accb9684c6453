"""The reference model in PyTorch, its checkpoints and its lowering. Only this folder of microvlm/ imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microvlm.model.microvlm import MicroVLM

__all__ = ["MicroVLM"]


def __getattr__(name: str) -> Any:
    if name == "MicroVLM":
        from microvlm.model.microvlm import MicroVLM

        return MicroVLM
    raise AttributeError(f"module 'microvlm.model' has no attribute '{name}'")
