"""Predicts times from instruction counts and bytes. Nothing here was measured on a board.

    T(phase) = max(kernels / (f * kernel_ipc), bytes / bandwidth) + others / (f * scalar_ipc)
    T(phase) = max(cycles / (f * cores), bytes / bandwidth) + others / (f * scalar_ipc)

`kernels` are the instructions of the native library, which reads the weights on every core while it works: the slower
of the two decides. `others` (ONNX Runtime's own operators, Python) count as if one core did them, before or after.
Instructions were counted on one thread. Not modelled: caches, address translation, throttling, what else runs.

`cycles` are the native library's on one core, by a table of the core's timings (`counting/kernel_cycles.py`), as if all
cores took equal parts and nobody waited for memory that is not weights. `kernel_ipc` was fitted to a whole program on a
board, which did wait: by it times are longer. Each says which code is faster, and neither how fast it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from microvlm.bench.pi.counting.instruction_cost import Cost
from microvlm.bench.pi.profiles import Profile
from microvlm.bench.pi.workload_phases import PICTURE, Scenario

IN_FIRST_TOKEN = ("vision", "prefill")
INSTRUCTIONS = "instructions"
TABLES = {"timings": "predicted_timings_kernel_cycles", "mca": "predicted_mca_kernel_cycles"}
"""Models of the core, and the field of a cost that holds cycles by each."""
FIRST_TOKEN, ANSWER, COLD, FROM_FILE = "first_token", "answer", "answer_cold", "answer_from_file"
BARS = ((ANSWER, "low", 10.0), (ANSWER, "high", 7.0), (FIRST_TOKEN, "low", 2.5))
"""(what, at which end of the bandwidth, seconds at most): full size, 50k vocabulary, Raspberry Pi Zero 2 W, warm."""


@dataclass(frozen=True)
class Predicted:
    """Milliseconds of one phase at both ends of the bandwidth: the low end of it is the longer time."""

    phase: str
    at_low_ms: float
    at_high_ms: float

    def row(self) -> dict[str, Any]:
        """`low` and `high` in milliseconds."""
        return {"phase": self.phase, "low": round(self.at_high_ms, 3), "high": round(self.at_low_ms, 3)}


def predicted_seconds(
    cost: Cost, profile: Profile, bandwidth_bytes_per_s: float, by: str = INSTRUCTIONS
) -> float:
    """One phase, once. by : one of TABLES for the native library's cycles, else its instructions."""
    clock = profile["clock_hz"]
    if by == INSTRUCTIONS:
        kernels = cost.kernel_instructions / (clock * profile["kernel_ipc"])
    else:
        kernels = getattr(cost, TABLES[by]) / (clock * profile["cores"])
    others = (cost.instructions - cost.kernel_instructions) / (clock * profile["scalar_ipc"])
    return max(kernels, cost.weight_bytes / bandwidth_bytes_per_s) + others


def predict(
    costs: Sequence[Cost], profile: Profile, scenario: Scenario, bundle_bytes: int, by: str = INSTRUCTIONS
) -> list[Predicted]:
    """Every phase, then first token and whole answer, warm and cold.

    Cold: nothing of the bundle is in memory, so that loading, and reading every byte of it from the card, come first.
    From a file: warm, with a JPEG of 3 megapixels to decode, where that was counted.
    """
    low, high = profile["bandwidth_low_bytes_per_s"], profile["bandwidth_high_bytes_per_s"]
    phases = {
        cost.phase: Predicted(
            cost.phase,
            1e3 * predicted_seconds(cost, profile, low, by),
            1e3 * predicted_seconds(cost, profile, high, by),
        )
        for cost in costs
    }
    first = _sum(FIRST_TOKEN, [(phases[name], 1) for name in IN_FIRST_TOKEN])
    # The first token comes with the prefill.
    answer = _sum(ANSWER, [(first, 1), (phases["decode"], scenario.answer_tokens - 1)])
    card_ms = 1e3 * bundle_bytes / profile["storage_bytes_per_s"]
    card = Predicted("card", card_ms, card_ms)
    cold = _sum(COLD, [(phases["load"], 1), (card, 1), (answer, 1)])
    file = [_sum(FROM_FILE, [(phases[PICTURE], 1), (answer, 1)])] if PICTURE in phases else []
    return [*phases.values(), first, answer, *file, cold]


def predict_by_tables(
    costs: Sequence[Cost], profile: Profile, scenario: Scenario, bundle_bytes: int
) -> dict[str, list[Predicted]]:
    """`predict` by each of TABLES that has cycles of every phase."""
    return {
        table: predict(costs, profile, scenario, bundle_bytes, table)
        for table, field in TABLES.items()
        if all(getattr(cost, field) is not None for cost in costs)
    }


def bars(predicted: Sequence[Predicted]) -> list[dict[str, Any]]:
    """The requirements on the full size on a Zero 2 W, and whether the predictions meet them."""
    times_by_phase = {time.phase: time for time in predicted}
    table = []
    for phase, end, at_most in BARS:
        time = times_by_phase[phase]
        seconds = (time.at_low_ms if end == "low" else time.at_high_ms) / 1e3
        table.append(
            {
                "name": f"predicted_{phase}_s at the {end} end of the bandwidth",
                "value": round(seconds, 3),
                "at_most": at_most,
                "met": seconds <= at_most,
            }
        )
    return table


def _sum(name: str, parts: Sequence[tuple[Predicted, int]]) -> Predicted:
    return Predicted(
        name,
        sum(times * part.at_low_ms for part, times in parts),
        sum(times * part.at_high_ms for part, times in parts),
    )
