"""The backend registry: names to classes by the entry-point group `microvlm.backends`, open to third parties.

A backend turns a checkpoint or a bundle into a `microvlm.runtime.Runtime`. Importing this needs neither torch nor
ONNX Runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from microvlm.errors import UserError
from microvlm.runtime import Runtime

GROUP = "microvlm.backends"
BUILT_IN = {
    "torch": "microvlm.backends.torch_eager:TorchBackend",
    "ort": "microvlm.backends.ort:OrtBackend",
    "ort-arm64": "microvlm.backends.arm64:Arm64Backend",
}
"""Our own entry points, as pyproject.toml has them: a checkout that was never installed has no metadata."""


class LoadedRuntime(Runtime, Protocol):
    """What `Backend.load` returns: a runtime that knows where it came from."""

    directory: Path
    """Holds the processor's files."""
    fingerprint: str
    """Equal for a checkpoint and every bundle made of it; a memory file belongs to one."""


class Backend(ABC):
    """One way to run a model. Subclasses take no arguments and import what they need in `load`."""

    name: str
    runs_here: bool = True
    """False where the work is done by another machine, or by an emulated one: its times are not this machine's."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run here, one sentence that says what to install; None when it can."""

    def kernels(self) -> str | None:
        """Which code would run the quantised layers here; None where there is only one. Raises UserError."""
        return None

    @abstractmethod
    def load(self, source: str | Path, threads: int | None = None, **options: Any) -> LoadedRuntime:
        """A checkpoint or bundle, by directory or by a name such as `nano`. Raises UserError for a bad one.

        `threads`: of one operator; None leaves the choice to the backend. Unknown options are a UserError.
        """


def backend_names() -> list[str]:
    """Every registered backend, sorted."""
    return sorted(_registered())


def get_backend(name: str) -> Backend:
    """Raises UserError for an unknown name, and for a backend whose package does not import."""
    registered = _registered()
    if name not in registered:
        raise UserError(f"unknown backend '{name}'; choose one of {', '.join(sorted(registered))}.")
    try:
        backend = registered[name].load()()
    except Exception as error:  # a third party's package may fail in any way; the others must go on
        raise UserError(
            f"backend '{name}' cannot be imported ({error}): reinstall the package it is from."
        ) from None
    if not isinstance(backend, Backend):
        raise UserError(f"backend '{name}' is no microvlm.backends.Backend: ask the package it is from.")
    return backend


def load(name: str, source: str | Path, threads: int | None = None, **options: Any) -> LoadedRuntime:
    """A runtime of the backend `name`. Raises UserError where it can't run or the model can't be loaded."""
    backend = get_backend(name)
    reason = backend.unavailable()
    if reason is not None:
        raise UserError(f"backend '{name}' cannot run here: {reason}")
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}; give 1 or more.")
    return backend.load(source, threads, **options)


def _registered() -> dict[str, EntryPoint]:
    built_in = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    return built_in | {point.name: point for point in entry_points(group=GROUP)}
