"""llama.cpp on a GGUF file, by the package xllamacpp: its server without a network, timed by the server's own clock.

The server tells milliseconds of the prompt, and of all tokens after it. The first of them is chosen from the prompt's
logits, so N tokens are N - 1 runs of the decoder; choosing and detokenising them is in the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from microvlm.errors import UserError

_FEATURES = (
    "AVX512_VNNI",
    "AVX512",
    "AVX_VNNI",
    "AVX2",
    "AVX",
    "SSE3",
    "DOTPROD",
    "MATMUL_INT8",
    "SVE",
    "NEON",
)
"""Instruction sets by which llama.cpp chooses its kernels, the best first. A wheel has those it was compiled for."""


class LlamaCppPeer:
    """`file`: the path of a GGUF file; `vocabulary`: of its tokens."""

    weight_bytes = None

    def __init__(self, threads: int, prompt_tokens: int, file: str, vocabulary: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        # No cache of earlier prompts: it would be memory that a decoder does not need.
        params.cache_ram_mib = 0
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError:
            raise UserError(f"llama.cpp cannot load {file}: give another GGUF file.") from None
        built_for = {name.strip() for name, on in _settings(xllamacpp.get_system_info()) if on == "1"}
        features = next((name for name in _FEATURES if name in built_for), "plain C")
        self.kernels = f"compiled for {features}"
        self._prompt = np.random.default_rng(0).integers(0, vocabulary, prompt_tokens).tolist()

    def run(self, new_tokens: int) -> tuple[float, float | None]:
        request = {
            "prompt": self._prompt,
            "n_predict": new_tokens + 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "temperature": 0,
            "samplers": [],
        }
        answer: dict[str, Any] = self._server.handle_completions(request)
        times = answer.get("timings")
        if times is None:
            raise UserError(f"llama.cpp's server answered '{answer.get('error')}': give another GGUF file.")
        if (times["prompt_n"], times["predicted_n"]) != (len(self._prompt), new_tokens + 1):
            raise UserError(
                f"llama.cpp read {times['prompt_n']} tokens and wrote {times['predicted_n']}, and "
                f"{len(self._prompt)} and {new_tokens + 1} were asked for: give another GGUF file."
            )
        return times["prompt_ms"], times["predicted_ms"] / new_tokens if new_tokens else None


def _settings(system: str) -> list[tuple[str, str]]:
    """`CPU : SSE3 = 1 | AVX = 1 | ` -> pairs of names and values."""
    parts = system.replace("CPU :", "").split("|")
    return [(part.partition("=")[0].strip(), part.partition("=")[2].strip()) for part in parts if "=" in part]
