"""onnxruntime-genai on a bundle of `microvlm-export --genai`: its own loop and cache over the bundle's decoder."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np


class GenaiPeer:
    """`file`: the folder of the bundle; `native`: whether our library runs our operators; `vocabulary`: of tokens.

    The first token after a prefill is chosen from its logits and runs nothing, so it is not timed.
    """

    weight_bytes = None

    def __init__(self, threads: int, prompt_tokens: int, file: str, native: bool, vocabulary: int):
        import onnxruntime_genai as genai

        options: dict[str, Any] = {"intra_op_num_threads": threads}
        self.kernels = "ONNX Runtime's own operators"
        if native:
            from microvlm.backends.native import active_variant, library_path

            self.kernels = "the operators' functions"
            library = library_path()
            if library is not None:
                options["custom_ops_library"] = str(library)
                self.kernels = f"native {active_variant()}"
        config = genai.Config(file)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        # It loads libraries from the folders of the model and of the process alone.
        with contextlib.chdir(Path(options.get("custom_ops_library", file)).parent):
            self._genai, self._model = genai, genai.Model(config)
        self._prompt = np.random.default_rng(0).integers(0, vocabulary, prompt_tokens).astype(np.int32)

    def run(self, new_tokens: int) -> tuple[float, float | None]:
        length = len(self._prompt) + new_tokens + 2
        params = self._genai.GeneratorParams(self._model)
        # A shortest length: an end token would end the round.
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, params)
        began = time.perf_counter()
        generator.append_tokens(self._prompt)
        prefill_ms = (time.perf_counter() - began) * 1e3
        if not new_tokens:
            return prefill_ms, None
        generator.generate_next_token()
        began = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        return prefill_ms, (time.perf_counter() - began) * 1e3 / new_tokens
