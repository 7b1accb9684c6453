"""`microvlm-bench compare` of two models: measures both in turns, judges every quantity and makes the document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.backends import backend_names, resolve_bundle
from microvlm.bench.comparison.ceilings import share_of_ceiling, weight_bytes
from microvlm.bench.comparison.energy import NOT_EXPOSED
from microvlm.bench.comparison.judgement import LEVEL, MARGIN, Judgement, judge, outliers, summary
from microvlm.bench.comparison.turns import ENERGY, Progress, Samples, Side, Turns, take_turns
from microvlm.bench.provenance import describe_model, provenance, streaming_read_bytes_per_s
from microvlm.bench.speed.speed_bench import measured_workload
from microvlm.errors import UserError
from microvlm.formats.bundle import open_bundle


@dataclass(frozen=True)
class SideOptions:
    """One side as the command line names it."""

    model: str
    backend: str = "ort"
    library: Path | None = None
    python: str | None = None

    def resolve(self, name: str) -> Side:
        """The side with its bundle, whose files were checked. Raises UserError."""
        if self.backend not in backend_names():
            raise UserError(f"there is no backend '{self.backend}'; there are: {', '.join(backend_names())}.")
        bundle = resolve_bundle(self.model)
        open_bundle(bundle)
        return Side(name, bundle, self.backend, self.library, self.python)


@dataclass(frozen=True)
class Options:
    """How much is measured, and what counts as a difference."""

    threads: int = 1
    pairs: int = 10
    rounds: int = 16
    new_tokens: int = 16
    margin: float = MARGIN


def run(
    first: SideOptions, second: SideOptions, options: Options, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """The document of a comparison in turns. Raises UserError for a side that cannot be measured."""
    a, b = first.resolve("A"), second.resolve("B")
    workload = measured_workload(a.bundle, options.new_tokens)
    turns = Turns(asdict(workload), options.threads, options.pairs, options.rounds)
    bandwidth = streaming_read_bytes_per_s()
    samples = take_turns(a, b, turns, progress)
    progress("reading memory at full speed, for the ceiling")
    bandwidth = max(bandwidth, streaming_read_bytes_per_s())
    judgements = judge_all(samples, options.margin)
    verdict, sentence = summary(judgements)
    return {
        "report": "compare",
        "in_turns": True,
        "verdict": verdict,
        "sentence": sentence,
        "a": _side(a, samples.paths[0]),
        "b": _side(b, samples.paths[1]),
        "margin": options.margin,
        "level": LEVEL,
        "pairs": options.pairs,
        "rounds": options.rounds,
        "quantities": [_quantity(judgement, samples, (a, b), bandwidth) for judgement in judgements],
        "energy_note": None if samples.joules is not None else NOT_EXPOSED,
        "ceiling": {"read_bandwidth_bytes_per_s": round(bandwidth), "threads": 1},
        "samples_ms": {
            # Six digits, of which the last is no longer measured.
            name: [[[float(f"{ms:.6g}") for ms in both] for both in pair] for pair in values.tolist()]
            for name, values in samples.ms.items()
        },
        "provenance": {
            **provenance(describe_model(a.bundle), options.threads),
            "models": [describe_model(a.bundle), describe_model(b.bundle)],
        },
    }


def judge_all(samples: Samples, margin: float = MARGIN) -> list[Judgement]:
    """Judge every quantity, energy last. The more quantities, the wider the interval of each."""
    values = dict(samples.ms)
    if samples.joules is not None:
        values[ENERGY] = samples.joules
    return [judge(name, array, len(values), margin) for name, array in values.items()]


def _side(side: Side, path: str) -> dict[str, Any]:
    return {
        "model": side.bundle.name,
        "backend": side.backend,
        "library": None if side.library is None else side.library.name,
        "other_python": side.python is not None,
        "path": path,
    }


def _quantity(
    judgement: Judgement, samples: Samples, sides: Sequence[Side], bandwidth: float
) -> dict[str, Any]:
    name = judgement.name
    values = samples.joules if name == ENERGY else samples.ms[name]
    assert values is not None
    medians = [float(np.median(values[..., place])) for place in (0, 1)]
    entry = {
        "name": name,
        "unit": "J" if name == ENERGY else "ms",
        "medians": [round(median, 5) for median in medians],
        **{key: round(value, 5) for key, value in judgement.ratio._asdict().items()},
        "verdict": judgement.verdict,
        "sentence": judgement.sentence,
        "outliers": [asdict(outliers(values[..., place])) for place in (0, 1)],
    }
    if name != ENERGY:
        read = [weight_bytes(side.bundle).get(name) for side in sides]
        shares = [
            share_of_ceiling(bytes_, median, bandwidth) for bytes_, median in zip(read, medians, strict=True)
        ]
        entry["shares_of_ceiling"] = [None if share is None else round(share, 4) for share in shares]
    return entry
