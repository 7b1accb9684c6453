"""One program in its own process: `python -m microvlm.bench.peers.peer_worker`. JSON lines in, JSON lines out.

Answers requests like `bench/speed/backend_worker.py`: load, round, memory. An adapter imports the program that it runs
and nothing else that is large, because this process's memory is what is reported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any, NamedTuple, Protocol

from microvlm.bench.speed.backend_worker import serve
from microvlm.errors import UserError


class Peer(Protocol):
    """A loaded program. Its class is made with `threads`, `prompt_tokens` and the contender's options."""

    kernels: str
    weight_bytes: int | None

    def run(self, new_tokens: int) -> tuple[float, float | None]:
        """Prefill the prompt and decode greedily -> (ms of the prefill, mean ms of a decoded token or None)."""
        ...


class Adapter(NamedTuple):
    """Where the class of a program is, and what must be installed for it."""

    module: str
    name: str
    package: str
    """The distribution, whose version is reported."""
    imported: str


ADAPTERS = {
    "bundle": Adapter("bundle_peer", "BundlePeer", "onnxruntime", "onnxruntime"),
    "genai": Adapter("genai_peer", "GenaiPeer", "onnxruntime-genai", "onnxruntime_genai"),
    "llama.cpp": Adapter("llama_cpp_peer", "LlamaCppPeer", "xllamacpp", "xllamacpp"),
    "torch": Adapter("torch_peer", "TorchPeer", "torch", "torch"),
}


class PeerWorker:
    """Answers requests, one dict each. Raises UserError for what the user can correct."""

    def __init__(self) -> None:
        self._peer: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, f"_{request.pop('do')}")(**request)

    def _load(
        self, adapter: str, threads: int, prompt_tokens: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        module, name, package, imported = ADAPTERS[adapter]
        if importlib.util.find_spec(imported) is None:
            raise UserError(f"{package} is not installed: pip install {package}.")
        made = getattr(importlib.import_module(f"microvlm.bench.peers.{module}"), name)
        self._peer = made(threads=threads, prompt_tokens=prompt_tokens, **options)
        return {
            "version": f"{package} {importlib.metadata.version(package)}",
            "kernels": self._peer.kernels,
            "weight_bytes": self._peer.weight_bytes,
        }

    def _round(self, new_tokens: int) -> dict[str, Any]:
        prefill_ms, decode_ms = self._peer.run(new_tokens)
        return {"prefill_ms": prefill_ms, "decode_ms": decode_ms}

    def _memory(self) -> dict[str, Any]:
        from microvlm.bench.provenance import memory_of_this_process

        return dict(memory_of_this_process())


if __name__ == "__main__":
    serve(PeerWorker())
