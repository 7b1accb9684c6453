"""Published results for a Raspberry Pi Zero 2 W: one fits the model of `predict`, another tests it.

Instructions of llama.cpp's products were counted on an emulated Cortex-A53, as ours are: its `ggml_vec_dot` functions
of llama-cpp-python 0.3.36, GCC 12, -O3 -march=armv8-a, over rows of 576 (Q5_0, Q8_0) and 1,536 (Q4_K, Q6_K). Rows of
576 are not a multiple of 256, so Q4_K_M stores them as Q5_0 and Q8_0. The fit also covers all else that it executes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

INSTRUCTIONS_PER_MAC = {"Q5_0": 1.463, "Q8_0": 0.883, "Q4_K": 0.908, "Q6_K": 1.085}
BYTES_PER_WEIGHT = {"Q5_0": 22 / 32, "Q8_0": 34 / 32, "Q4_K": 144 / 256, "Q6_K": 210 / 256}
CLOCK_HZ = 1.0e9

_SMOLLM2_LAYERS = 30
_SMOLLM2_LAYER = {
    # q, k, o, gate, up; half of the layers' v
    "Q5_0": 576 * 576 * 2 + 576 * 192 + 2 * 576 * 1536 + 576 * 192 // 2,
    "Q8_0": 576 * 192 // 2,
    # down: half of the layers each
    "Q4_K": 576 * 1536 // 2,
    "Q6_K": 576 * 1536 // 2,
}
"""Weights of a layer of SmolLM2-135M by type, as llama.cpp's Q4_K_M mixture chooses them."""
_SMOLLM2_HEAD = {"Q8_0": 49152 * 576}


@dataclass(frozen=True)
class Anchor:
    """A published speed, tokens a second: the range that was reported, or one figure twice."""

    name: str
    low: float
    high: float
    source: str

    @property
    def middle(self) -> float:
        """The geometric mean."""
        return (self.low * self.high) ** 0.5


_REPORT = "reported of llama.cpp on a Zero 2 W; the page's address was not kept"
_RUSTLLM = "llm-inference.com, SmolLM on a Smol Machine: rustllm on a Zero 2 W"
PREFILL = Anchor("SmolLM2-135M Q4_K_M prefill", 10, 18, _REPORT)
DECODE = Anchor("SmolLM2-135M Q4_K_M decode", 9, 11, _REPORT)
HELD_OUT = Anchor("SmolLM-360M Q4_K_M decode", 2.6, 2.6, _RUSTLLM)
HELD_OUT_BYTES = 210e6
HELD_OUT_MACS = 362e6


def instructions(weights: dict[str, int]) -> float:
    return sum(INSTRUCTIONS_PER_MAC[kind] * count for kind, count in weights.items())


def weight_bytes(weights: dict[str, int]) -> float:
    return sum(BYTES_PER_WEIGHT[kind] * count for kind, count in weights.items())


def fitted_kernel_ipc() -> float:
    """Instructions a cycle of all four cores together: the prefill's, whose weights are read once for many tokens."""
    return PREFILL.middle * _SMOLLM2_LAYERS * instructions(_SMOLLM2_LAYER) / CLOCK_HZ


def fitted_bandwidth() -> float:
    """Bytes a second: the decode's, if memory and not arithmetic was what it waited for."""
    return DECODE.middle * (_SMOLLM2_LAYERS * weight_bytes(_SMOLLM2_LAYER) + weight_bytes(_SMOLLM2_HEAD))


def fit_document() -> dict[str, Any]:
    """The fit, its error on the anchors, and its error on the held-out board result."""
    ipc, bandwidth = fitted_kernel_ipc(), fitted_bandwidth()
    layers = _SMOLLM2_LAYERS * instructions(_SMOLLM2_LAYER)
    decode = max((layers + instructions(_SMOLLM2_HEAD)) / (CLOCK_HZ * ipc), _decode_bytes() / bandwidth)
    held_out = max(
        HELD_OUT_MACS * INSTRUCTIONS_PER_MAC["Q4_K"] / (CLOCK_HZ * ipc), HELD_OUT_BYTES / bandwidth
    )
    return {
        "kernel_ipc": round(ipc, 3),
        "bandwidth_bytes_per_s": round(bandwidth),
        "anchors": [
            _compared(PREFILL, CLOCK_HZ * ipc / layers),
            _compared(DECODE, 1 / decode),
        ],
        "held_out": _compared(HELD_OUT, 1 / held_out),
    }


def _decode_bytes() -> float:
    return _SMOLLM2_LAYERS * weight_bytes(_SMOLLM2_LAYER) + weight_bytes(_SMOLLM2_HEAD)


def _compared(anchor: Anchor, predicted: float) -> dict[str, Any]:
    return {
        "name": anchor.name,
        "source": anchor.source,
        "published_tokens_per_s": [anchor.low, anchor.high],
        "predicted_tokens_per_s": round(predicted, 2),
        "error": round(predicted / anchor.middle - 1, 3),
    }
