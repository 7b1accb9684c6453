"""`microvlm-bench kernels`: finds the contenders that run here, measures them, and makes the document."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from microvlm.backends import native
from microvlm.bench.kernels.contenders import FUNCTION, OURS, PEERS, Contender, choose, variants_of
from microvlm.bench.kernels.cortex_a53 import predicted_loops
from microvlm.bench.kernels.kernel_document import document
from microvlm.bench.kernels.measure import Measurement, Progress
from microvlm.bench.kernels.workload import Plan
from microvlm.bench.provenance import provenance
from microvlm.bench.roofline import StreamingRoofline


def run(plan: Plan, names: Sequence[str] = (), progress: Progress = lambda _: None) -> dict[str, Any]:
    """The document of `--json`. `names` of contenders; all that can run here by default. Raises UserError."""
    library = native.library_path()
    active = native.active_variant() if library else None
    others = [name for name in native.variants() if name != active] if library else []
    contenders = choose(available(active, others), names, library is not None)
    if library is None:
        progress("there is no native library here: our operators run as function bodies only")
    roofline = StreamingRoofline(plan.stream_bytes)
    with tempfile.TemporaryDirectory(prefix="microvlm-stream-") as folder:
        mapped = StreamingRoofline.of_mapped_file(Path(folder) / "stream", plan.stream_bytes)
        measurement = Measurement(plan, contenders, library, (roofline, mapped), progress)
        cells = list(measurement.cells())
    described = {
        **provenance({"name": "random weights"}, None),
        "threads": list(plan.threads),
        "kernels": active or "function bodies",
        "other_variants": others,
    }
    return {
        **document(cells, measurement.states, roofline, mapped, described),
        "predicted_cortex_a53": _cortex_a53() if plan.simulate else None,
    }


def _cortex_a53() -> dict[str, Any]:
    """Speed of the ARMv8.0 kernels' inner loops on a simulated Cortex-A53; needs a checkout and its tools."""
    estimates, reason = predicted_loops()
    loops = [
        {
            "op": estimate.loop.op,
            "packed_rows": estimate.loop.rows,
            "tokens": estimate.loop.tokens,
            "predicted_macs_per_cycle": round(estimate.predicted_macs_per_cycle, 3),
            "predicted_macs_per_cycle_bound": round(estimate.predicted_macs_per_cycle_bound, 3),
        }
        for estimate in estimates or ()
    ]
    return {"simulator": "llvm-mca -mcpu=cortex-a53", "loops": loops, "unavailable": reason or None}


def available(active: str | None, others: Sequence[str]) -> list[Contender]:
    """Every contender that can run here, ours first. `active` is None without a native library."""
    ours = (
        [*OURS, *(variant for contender in OURS for variant in variants_of(contender, others))]
        if active
        else []
    )
    return [*ours, FUNCTION, *PEERS]
