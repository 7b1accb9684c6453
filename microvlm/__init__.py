"""MicroVLM: a tiny vision-language model with an episodic memory and ternary weights.

The public names below are imported on first use: `import microvlm` alone imports no torch, ONNX Runtime or numpy, and a
device without torch can use everything but `MicroVLM` and `export`. `docs/api.md` shows each of them.
"""

from __future__ import annotations

import importlib
import os

# Type checkers know this name. The module typing, of which a program that only starts has no need, takes milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from microvlm.errors import UserError
    from microvlm.inputs.processor import Processor
    from microvlm.loaded_model import LoadedModel, export, load
    from microvlm.memory.conversation import Chat
    from microvlm.memory.facts import FactMemory
    from microvlm.model.microvlm import MicroVLM
    from microvlm.sampling import GenerationOptions

__all__ = [
    "Chat",
    "FactMemory",
    "GenerationOptions",
    "LoadedModel",
    "MicroVLM",
    "Processor",
    "UserError",
    "export",
    "load",
]

__version__ = "0.1.0"
"""pyproject.toml reads it from here: a checkout that was never installed has a version too."""

_MODULES = {
    "Chat": "memory.conversation",
    "FactMemory": "memory.facts",
    "GenerationOptions": "sampling",
    "LoadedModel": "loaded_model",
    "MicroVLM": "model.microvlm",
    "Processor": "inputs.processor",
    "UserError": "errors",
    "export": "loaded_model",
    "load": "loaded_model",
}
"""Public name -> the module that defines it."""

# ONNX Runtime's official builds since 1.29 start threads that report usage to its maker, to a database in the user's
# cache and to the network, as soon as they are imported. Only this variable, set before, prevents it (its Privacy.md).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'microvlm' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"microvlm.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
