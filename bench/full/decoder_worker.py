"""The decoder of a bundle in its own process: `python -m microvlm.bench.full.decoder_worker`. ONNX Runtime alone.

Answers requests like `bench/speed/backend_worker.py`: load, round, memory, tokenizer. Opens token embedding and decoder
only, and imports nothing but ONNX Runtime and numpy before it reads its memory for the first time.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from microvlm.bench.speed.backend_worker import serve


class DecoderWorker:
    """Prefills and decodes random tokens."""

    def __init__(self) -> None:
        self._runtime: Any = None
        self._tokens = np.zeros((1, 0), np.int64)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, f"_{request['do']}")(
            **{key: value for key, value in request.items() if key != "do"}
        )

    def _load(self, model: str, threads: int, prompt_tokens: int) -> dict[str, Any]:
        import onnxruntime  # noqa: F401

        from microvlm.bench.provenance import memory_of_this_process

        before = memory_of_this_process()
        from microvlm.backends import get_backend

        began = time.perf_counter()
        self._runtime = get_backend("ort").load(model, threads)
        for graph in ("embed_tokens", "decoder_model_merged"):
            self._runtime.session(graph)
        vocabulary = self._runtime.config.text.vocab_size
        self._tokens = np.random.default_rng(0).integers(0, vocabulary, (1, prompt_tokens))
        load_ms = (time.perf_counter() - began) * 1e3
        return {"memory_before": before, "load_ms": load_ms, "kernels": self._runtime.kernels}

    def _round(self, new_tokens: int) -> dict[str, Any]:
        """One prefill and `new_tokens` greedy steps -> milliseconds of the prefill and of each step."""
        runtime, count = self._runtime, self._tokens.shape[1]
        mask = np.ones((1, count + 1), np.int64)
        mask[0, 0] = 0  # nothing is remembered
        began = time.perf_counter()
        embeds = runtime.embed_tokens(self._tokens)
        positions = np.arange(1, count + 1)[None]
        logits, past = runtime.decode(embeds, mask, positions, runtime.empty_slot(1), 1)
        prefill_ms = (time.perf_counter() - began) * 1e3
        decode_ms = []
        for step in range(1, new_tokens + 1):
            began = time.perf_counter()
            token = logits[:, -1].argmax(-1)[:, None]
            mask = np.concatenate([mask, np.ones((1, 1), np.int64)], 1)
            logits, past = runtime.decode(
                runtime.embed_tokens(token), mask, np.array([[count + step]]), past, 1
            )
            decode_ms.append((time.perf_counter() - began) * 1e3)
        return {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "finite": bool(np.isfinite(logits).all())}

    def _memory(self) -> dict[str, Any]:
        from microvlm.bench.provenance import memory_of_this_process

        return dict(memory_of_this_process())

    def _tokenizer(self, model: str) -> dict[str, Any]:
        """Anonymous bytes of the bundle's tokenizer."""
        from microvlm.bench.provenance import memory_of_this_process
        from microvlm.inputs.processor import Processor

        before = memory_of_this_process()["anonymous_bytes"]
        self._processor = Processor.from_pretrained(model)
        after = memory_of_this_process()["anonymous_bytes"]
        return {"anonymous_bytes": None if before is None or after is None else after - before}


if __name__ == "__main__":
    serve(DecoderWorker())
