"""Backends by name: `load("ort", "nano")` gives a `Runtime`. Needs neither torch nor transformers."""

from microvlm.backends.base import Backend, LoadedRuntime, backend_names, get_backend, load
from microvlm.backends.resolve import resolve_bundle

__all__ = ["Backend", "LoadedRuntime", "backend_names", "get_backend", "load", "resolve_bundle"]
