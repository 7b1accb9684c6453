"""A bundle's decoder on ONNX Runtime: our operators, or ONNX Runtime's own where the bundle was lowered to them."""

from __future__ import annotations

from statistics import fmean

from microvlm.bench.full.decoder_worker import DecoderWorker

OWN_KERNELS = {"matmulnbits": "its own MatMulNBits", "qdq": "its own DequantizeLinear and MatMul"}
"""What a file of another lowering than ours has; `microvlm-bench paths` finds what a session makes of it."""


class BundlePeer:
    """`file`: the folder of the bundle; `lowering`: its manifest's."""

    weight_bytes = None

    def __init__(self, threads: int, prompt_tokens: int, file: str, lowering: str):
        self._worker = DecoderWorker()
        loaded = self._worker.answer(
            {"do": "load", "model": file, "threads": threads, "prompt_tokens": prompt_tokens}
        )
        self.kernels = OWN_KERNELS.get(lowering) or loaded["kernels"]

    def run(self, new_tokens: int) -> tuple[float, float | None]:
        times = self._worker.answer({"do": "round", "new_tokens": new_tokens})
        return times["prefill_ms"], fmean(times["decode_ms"]) if new_tokens else None
