"""`ort-arm64` in `microvlm-bench run` without an ARM machine: counted instructions, predicted times, equivalence.

Nothing here is a measured time. Counts are a committed baseline's where it is of the bundle's graphs, else counted once
and kept; the equivalence with `ort` is short, and kept too. What is missing becomes a sentence that says how to get it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from microvlm.backends.arm64.transports.device_package import package_for
from microvlm.backends.emulation import runtime_requirements
from microvlm.backends.emulation.cache import cached_folder
from microvlm.bench.pi import count_baseline, predict, profiles
from microvlm.bench.pi.counting import counting_emulator, emulated_package, instruction_cost
from microvlm.bench.pi.counting.instruction_cost import Cost
from microvlm.bench.pi.workload_phases import Scenario
from microvlm.bench.provenance import describe_model
from microvlm.bench.temporary_environment import environment
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count

Progress = Callable[[str], None]
T = TypeVar("T")
BACKEND = "ort-arm64"
COMPOSITION = {
    "load": (("load", 1),),
    "vision": (("vision", 1),),
    "memory_write": (("memory_encode", 2), ("memory_write", 1)),
    "memory_read": (("memory_encode", 1), ("memory_read", 1)),
    "prefill": (("prefill", 1),),
    "decode": (("decode", 1),),
}
"""Phases of `run` -> counted phases and how often each is done. A write encodes its key and its fact. `end_to_end` also
decodes an image file, which is not counted."""
IMAGES, SCENES, EPISODE_STEPS, NEW_TOKENS = 1, 1, 4, 8
"""Samples of the equivalence check: enough to run every graph; `microvlm-bench pi` and `equivalence` compare more."""


class _Ran(msgspec.Struct, frozen=True):
    compiler: str
    onnxruntime: str


class _CachedCounts(msgspec.Struct, frozen=True):
    ran: _Ran
    costs: list[Cost]


class _CachedEquivalence(msgspec.Struct, frozen=True):
    against: str
    verdict: str
    reasons: list[str]
    samples: Count
    sums: Count | None
    sums_differing: Count | None


def emulated_entry(bundle: Path, cpu: str, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Figures of one bundle by phase of `run`:

    `counted_instructions` and `predicted_ms` ({"low", "high"}, milliseconds on `board`), `counts_from` (whose counts),
    `equivalence` with `ort`, each None where it cannot be had, and `missing`: sentences that say why.
    """
    missing: list[str] = []
    entry: dict[str, Any] = {
        "cpu": cpu,
        "counted_instructions": None,
        "predicted_ms": None,
        "missing": missing,
    }
    try:
        costs, entry["counts_from"] = _costs(bundle, cpu, progress)
        entry |= _by_phase(costs, cpu, bundle)
    except (UserError, counting_emulator.IllegalInstruction) as error:
        missing.append(f"no instructions counted: {error}")
    try:
        entry["equivalence"] = _equivalence(bundle, cpu, progress)
    except UserError as error:
        entry["equivalence"] = None
        missing.append(f"no equivalence checked: {error}")
    return entry


def _by_phase(costs: Sequence[Cost], cpu: str, bundle: Path) -> dict[str, Any]:
    profile = _board(cpu)
    counted = {cost.phase: cost.instructions for cost in costs}
    bundle_bytes = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    predicted = {time.phase: time for time in predict.predict(costs, profile, Scenario(), bundle_bytes)}

    def milliseconds(parts: Sequence[tuple[str, int]], end: str) -> float:
        return round(sum(times * getattr(predicted[name], end) for name, times in parts), 3)

    return {
        "board": profile.name,
        "counted_instructions": {
            phase: sum(times * counted[name] for name, times in parts) for phase, parts in COMPOSITION.items()
        },
        "predicted_ms": {
            phase: {"low": milliseconds(parts, "at_high_ms"), "high": milliseconds(parts, "at_low_ms")}
            for phase, parts in COMPOSITION.items()
        },
    }


def _board(cpu: str) -> profiles.Profile:
    """The default board where it has this core, else the first that has. Raises UserError."""
    names = [profiles.DEFAULT, *profiles.profile_names()]
    boards = [profiles.load_profile(name) for name in names]
    matching = next((board for board in boards if board.cpu == cpu), None)
    if matching is None:
        raise UserError(
            f"no board's profile is for a {cpu}: choose among {', '.join({b.cpu for b in boards})}."
        )
    return matching


def _costs(bundle: Path, cpu: str, progress: Progress) -> tuple[list[Cost], str]:
    """(every phase's cost, whose counts they are). Raises UserError or IllegalInstruction."""
    baseline = count_baseline.of_graphs(bundle, cpu)
    if baseline is not None:
        costs = [
            Cost(
                phase,
                figures.instructions,
                figures.simd,
                instruction_cost.weight_bytes(bundle, phase),
                figures.instructions - figures.others,
                0,
            )
            for phase, figures in baseline.phases.items()
        ]
        made_with = f"{baseline.key.compiler}, onnxruntime {baseline.key.onnxruntime}"
        return costs, f"the committed baseline of these graphs ({made_with})"
    counting_emulator.require_emulator()
    emulated_package.require_library()

    def count(folder: Path) -> None:
        progress(f"counting instructions on an emulated {cpu}, once")
        package = emulated_package.package_of_board()
        machine = counting_emulator.open_board(package, cpu)
        counted = instruction_cost.count_bundle(machine, package, bundle, Scenario())
        document = {"ran": counted.ran, "costs": [asdict(cost) for cost in counted.costs]}
        (folder / "counts.json").write_text(json.dumps(document))

    recipe = {**_recipe(cpu), "graphs": count_baseline.graphs_hash(bundle)}
    counted = _cached(cached_folder("counts", recipe, count) / "counts.json", _CachedCounts)
    ran = counted.ran
    return counted.costs, f"counted on this machine ({ran.compiler}, onnxruntime {ran.onnxruntime})"


def _equivalence(bundle: Path, cpu: str, progress: Progress) -> dict[str, Any]:
    """Verdict, reasons, and integer sums of `ort-arm64` on the emulated core against `ort` here. Raises UserError."""

    def compare(folder: Path) -> None:
        from microvlm.bench.equivalence.equivalence_bench import Options, run

        progress(f"checking the equivalence with ort on an emulated {cpu}, once")
        with environment("MICROVLM_TARGET", f"emulated:{cpu}"):
            options = Options(
                str(bundle),
                reference="ort",
                candidate=BACKEND,
                threads=1,
                images=IMAGES,
                scenes=SCENES,
                episode_steps=EPISODE_STEPS,
                new_tokens=NEW_TOKENS,
            )
            document, _ = run(options, progress)
        summary = {name: document[name] for name in ("verdict", "reasons", "samples")}
        replay = {name: document["replay"].get(name) for name in ("sums", "sums_differing")}
        (folder / "equivalence.json").write_text(json.dumps({"against": "ort", **summary, **replay}))

    workload = [IMAGES, SCENES, EPISODE_STEPS, NEW_TOKENS]
    recipe = {**_recipe(cpu), "bundle": describe_model(bundle)["sha256"], "workload": workload}
    cached = cached_folder("equivalence", recipe, compare) / "equivalence.json"
    checked: dict[str, Any] = msgspec.to_builtins(_cached(cached, _CachedEquivalence))
    return checked


def _cached(path: Path, kind: type[T]) -> T:
    return documents.load(path, kind, f"delete {path.parent}")


def _recipe(cpu: str) -> dict[str, Any]:
    """Cache key: everything that a result depends on besides the bundle. Raises UserError."""
    return {
        "cpu": cpu,
        "package": package_for(emulated_package.MACHINE).digest,
        "requirements": list(runtime_requirements()),
    }
