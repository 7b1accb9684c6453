"""The backend registry: names to classes by the entry-point group `microvlm.backends`, open to third parties' names.

A backend turns a checkpoint or a bundle into a `microvlm.runtime.Runtime`. Importing this needs neither torch nor
ONNX Runtime.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from microvlm.backends.threads import AUTO, Threads, check_threads
from microvlm.errors import UserError
from microvlm.runtime import Runtime
from microvlm.sources.model_source import find_model

GROUP = "microvlm.backends"
BUILT_IN = {
    "torch": "microvlm.backends.torch_eager:TorchBackend",
    "ort": "microvlm.backends.ort:OrtBackend",
    "ort-arm64": "microvlm.backends.arm64:Arm64Backend",
}
"""Our own entry points, as pyproject.toml has them: a checkout that was never installed has no metadata."""


class LoadedRuntime(Runtime, Protocol):
    """The result of `Backend.load`: a runtime that knows its model's origin.

    It may implement the optional Protocols of `microvlm.runtime` too.
    """

    directory: Path
    """Holds the processor's files."""
    fingerprint: str
    """Equal for a checkpoint and every bundle made of it; a memory file belongs to one."""


class Backend(ABC):
    """One way to run a model. Subclasses take no arguments and import what they need in `load`."""

    name: str
    libraries: tuple[str, ...] = ()
    """Modules that `load` imports. A benchmark imports them first, so that the time of `load` is the model's."""
    runs_here: bool = True
    """False where another machine, or an emulated one, does the work: its times are not this machine's."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """One sentence: why this backend cannot run here and what to install. None when it can run."""

    def kernels(self) -> str | None:
        """Name of the code that would run the quantised layers here; None if there is no choice. Raises UserError."""
        return None

    @abstractmethod
    def load(self, source: str | Path, threads: int | None = None, **options: Any) -> LoadedRuntime:
        """Load the checkpoint or bundle that `source` means to `microvlm.sources.model_source.find_model`.

        `load` of this module passes its folder.

        `threads`: threads of one operator; None leaves the choice to the backend. Raises UserError for a model that
        cannot be loaded and for an unknown option.
        """


def backend_names() -> list[str]:
    """Names of the registered backends, sorted."""
    return sorted(_registered())


def get_backend(name: str) -> Backend:
    """The backend of this name. Raises UserError for an unknown name and for a package that cannot be imported.

    Our own are found without a look at all installed packages, which takes as long as to check a bundle.
    """
    registered = _built_in() if name in BUILT_IN else _registered()
    if name not in registered:
        raise UserError(f"unknown backend '{name}'; choose one of {', '.join(sorted(registered))}.")
    try:
        backend = registered[name].load()()
    except Exception as error:  # a third party's package may fail in any way; the others must go on
        raise UserError(
            f"backend '{name}' cannot be imported ({error}): reinstall the package it is from."
        ) from None
    if not isinstance(backend, Backend):
        raise UserError(f"backend '{name}' is not a microvlm.backends.Backend: ask the package it is from.")
    return backend


def load(name: str, source: str | os.PathLike[str], threads: Threads = None, **options: Any) -> LoadedRuntime:
    """Load a model on the backend `name`. Raises UserError where it cannot run or the model cannot be loaded.

    `threads`: of one operator; None leaves the number to the backend, and "auto" measures which one answers fastest.
    """
    backend = usable_backend(name)
    if threads == AUTO:
        from microvlm.backends.thread_choice import load_fastest

        return load_fastest(backend, find_model(source).folder, **options)
    if threads is not None:
        check_threads(threads)
    return backend.load(find_model(source).folder, threads, **options)


def usable_backend(name: str) -> Backend:
    """The backend of this name. Raises UserError where it cannot run here, too."""
    backend = get_backend(name)
    reason = backend.unavailable()
    if reason is not None:
        raise UserError(f"backend '{name}' cannot run here: {reason}")
    return backend


def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)} | _built_in()


def _built_in() -> dict[str, EntryPoint]:
    return {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
