"""The document of `microvlm-bench kernels`: rows, ratios against the best peer with their bars, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from microvlm.bench.kernels.contenders import DECODE_PEERS, PREFILL_PEERS
from microvlm.bench.kernels.measure import State
from microvlm.bench.kernels.timing import Cell, Timing
from microvlm.bench.kernels.workload import LAYER
from microvlm.bench.roofline import StreamingRoofline, share
from microvlm.bench.stats import percentile, ratio_of_medians

OURS = "ours-2bit"


@dataclass(frozen=True)
class Bar:
    """A least value that our two bits must reach in one cell; None where nothing is demanded."""

    speedup: float | None
    roofline_share: float | None = None


def bar_for(shape: str, regime: str, threads: int, batch: int) -> Bar:
    """Decode: 2.0 times the best 2- or 4-bit peer hot and 1.6 from memory on a layer, 1.6 on any one shape. Prefill of
    32 and 64 tokens: 1.7 times the best 2-, 4- or 8-bit peer on a layer. One thread, from memory: 75 % of the roofline.
    """
    if batch == 1:
        speedup = 2.0 if (shape, regime) == (LAYER, "hot") else 1.6
        streams = (shape, regime, threads) == (LAYER, "dram", 1)
        return Bar(speedup, 0.75 if streams else None)
    return Bar(1.7 if shape == LAYER and batch in (32, 64) else None)


def document(
    cells: Sequence[Cell],
    states: dict[str, State],
    roofline: StreamingRoofline,
    mapped: StreamingRoofline,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """`roofline` is of the memory, which the bars are about; `mapped` of a file in the page cache, as weights are."""
    bars = [bar for cell in cells if (bar := compare(cell, cells, roofline)) is not None]
    for bar in bars:
        streams = [stream.gb_per_s(bar["threads"]) for stream in (roofline, mapped)]
        bar["mapped_stream_share"] = round(bar["roofline_share"] * streams[0] / streams[1], 4)
    return {
        "report": "kernels",
        "rows": [row for cell in cells for row in rows(cell, roofline)],
        "bars": bars,
        "contenders": [{"name": name, **asdict(state)} for name, state in states.items()],
        "provenance": {
            **provenance,
            "stream_gb_per_s": roofline.summary(),
            "mapped_stream_gb_per_s": mapped.summary(),
        },
    }


def rows(cell: Cell, roofline: StreamingRoofline) -> list[dict[str, Any]]:
    """One row a contender, at its best setting; `tried_ms` has the others, warm-up figures where they were hopeless."""
    names = dict.fromkeys(timing.contender.name for timing in cell.timings)
    best = [timing for name in names if (timing := cell.best(name)) is not None]
    return [_row(cell, timing, roofline) for timing in best]


def _row(cell: Cell, timing: Timing, roofline: StreamingRoofline) -> dict[str, Any]:
    seconds = timing.median_ms * 1e-3
    name = timing.contender.name
    others = [other for other in cell.timings if other.contender.name == name]
    stream = roofline.gb_per_s(cell.threads)
    return {
        "shape": cell.shape.name,
        "k": cell.shape.k,
        "n": cell.shape.n,
        "batch": cell.batch,
        "threads": cell.threads,
        "regime": cell.regime,
        "contender": name,
        "gmac_per_s": round(cell.shape.weights * cell.batch / seconds / 1e9, 3),
        "gb_per_s": round(timing.weight_bytes / seconds / 1e9, 3),
        "roofline_share": round(share(timing.weight_bytes, seconds, stream), 4),
        "median_ms": round(timing.median_ms, 6),
        "p10_ms": round(percentile(timing.ms, 10), 6),
        "p90_ms": round(percentile(timing.ms, 90), 6),
        "rounds": len(timing.ms),
        "weight_bytes": timing.weight_bytes,
        "run_bytes": timing.run_bytes,
        "setting": str(timing.setting),
        "tried_ms": {str(other.setting): round(other.median_ms, 6) for other in others},
    }


def compare(cell: Cell, cells: Sequence[Cell], roofline: StreamingRoofline) -> dict[str, Any] | None:
    """Our two bits against the fastest peer of the cell, or None where either is missing.

    A peer that is faster on fewer threads counts with those: that is a setting, too.
    """
    ours = cell.best(OURS)
    allowed = DECODE_PEERS if cell.batch == 1 else PREFILL_PEERS
    peers = [
        (timing, other.threads)
        for other in cells
        if (other.shape, other.regime, other.batch) == (cell.shape, cell.regime, cell.batch)
        and other.threads <= cell.threads
        for name in allowed
        if (timing := other.best(name)) is not None
    ]
    if ours is None or not peers:
        return None
    peer, peer_threads = min(peers, key=lambda pair: pair[0].median_ms)
    count = min(len(peer.ms), len(ours.ms))
    interval = ratio_of_medians(peer.ms[:count], ours.ms[:count])
    bar = bar_for(cell.shape.name, cell.regime, cell.threads, cell.batch)
    reached = share(ours.weight_bytes, ours.median_ms * 1e-3, roofline.gb_per_s(cell.threads))
    return {
        "shape": cell.shape.name,
        "regime": cell.regime,
        "threads": cell.threads,
        "batch": cell.batch,
        "best_peer": peer.contender.name,
        "best_peer_threads": peer_threads,
        "best_peer_setting": str(peer.setting),
        "speedup": round(interval.value, 4),
        "speedup_low": round(interval.low, 4),
        "speedup_high": round(interval.high, 4),
        "required_speedup": bar.speedup,
        "roofline_share": round(reached, 4),
        "required_roofline_share": bar.roofline_share,
        "met": _met(interval.value, bar.speedup) and _met(reached, bar.roofline_share),
    }


def _met(value: float, least: float | None) -> bool:
    return least is None or value >= least
