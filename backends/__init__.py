"""Backends by name: `load("ort", "photo")` gives a `Runtime`. Needs neither torch nor transformers."""

if __name__ != "microvlm.backends":
    raise ImportError("this folder is part of the package microvlm: write 'import microvlm.backends'.")

from microvlm.backends.base import Backend, LoadedRuntime, backend_names, get_backend, load
from microvlm.backends.resolve import resolve_bundle

__all__ = ["Backend", "LoadedRuntime", "backend_names", "get_backend", "load", "resolve_bundle"]
