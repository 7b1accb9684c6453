"""`microvlm-bench loops`: compiles the kernels for ARMv8.0 and predicts their inner loops by two models of the core."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from microvlm.bench.kernels.cortex_a53 import (
    ARMV8_0,
    CROSS,
    KERNELS,
    NEON,
    build_object,
    find_loops,
    missing,
    simulate,
)
from microvlm.bench.loops.in_order_core import cycles_of
from microvlm.bench.provenance import provenance
from microvlm.errors import UserError

GCC = (f"{CROSS}g++",)


def run(compiler: Sequence[str] = GCC) -> dict[str, Any]:
    """The document of `--json`. compiler : a command that compiles C++ for aarch64.

    Raises UserError where a tool is missing, the compiler refuses, or a loop has an instruction without timings.
    """
    reason = missing(compiler[0], f"{CROSS}objdump", "llvm-mca")
    if reason:
        raise UserError(f"{reason} apt-get install g++-aarch64-linux-gnu llvm, in a checkout.")
    with TemporaryDirectory() as folder:
        try:
            variant = build_object(KERNELS / f"{NEON}.cpp", ARMV8_0, Path(folder), compiler)
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"{' '.join(compiler)} did not compile the kernels: see what it wrote."
            ) from error
        loops = find_loops(variant)
        version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    rows = []
    for loop in loops:
        estimate, cycles = simulate(loop), cycles_of(loop.body)
        rows.append(
            {
                "op": loop.op,
                "packed_rows": loop.rows,
                "tokens": loop.tokens,
                "instructions": loop.instructions,
                "multiply_adds": loop.multiply_adds,
                "predicted_mca_macs_per_cycle": round(estimate.predicted_macs_per_cycle, 3),
                "predicted_mca_bound_macs_per_cycle": round(estimate.predicted_macs_per_cycle_bound, 3),
                "predicted_timings_macs_per_cycle": round(loop.multiply_adds / cycles, 3),
            }
        )
    return {
        "report": "loops",
        "compiler": version.splitlines()[0].strip(),
        "loops": rows,
        "provenance": provenance({"name": "kernels of ARMv8.0"}, None),
    }
