"""Cost of each phase of a model on a board: executed instructions, counted under emulation, and bytes of weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.backends.emulation import EmulatedMachine
from microvlm.bench.loops import mca_core
from microvlm.bench.pi.counting import kernel_cycles
from microvlm.bench.pi.counting.counting_emulator import Region, count
from microvlm.bench.pi.counting.emulated_package import Package
from microvlm.bench.pi.counting.kernel_cycles import Cycles
from microvlm.bench.pi.workload_phases import GRAPHS, Scenario
from microvlm.bench.stats import median
from microvlm.errors import UserError
from microvlm.formats.documents import Count, Size

EMBEDDING = "embedding.data"
"""The table that `embed_tokens` takes rows of and the tied head reads whole."""

BINUTILS = "binutils-aarch64-linux-gnu"
FIGURES = ("total", "simd", "library", "crypto")


class MarkedPhase(msgspec.Struct, frozen=True):
    """The regions in which a phase ran, and how often it ran in each."""

    regions: Annotated[list[Count], Meta(min_length=1)]
    repeats: Size


class CountedModel(msgspec.Struct, frozen=True):
    """What `counted_model` prints."""

    regions: dict[str, MarkedPhase]
    kernels: str
    finite: bool
    machine: str
    python: str
    onnxruntime: str
    numpy: str


@dataclass(frozen=True)
class Cost:
    """One phase, once; `decode` is one token."""

    phase: str
    instructions: int
    simd: int
    weight_bytes: int
    kernel_instructions: int
    """Instructions executed in the native library, which reads the weights; 0 where the function bodies ran."""
    crypto: int
    predicted_timings_kernel_cycles: int | None = None
    """Cycles of one core in the native library by published timings; None where nothing said which code ran."""
    predicted_mca_kernel_cycles: int | None = None
    """The same by llvm-mca."""


@dataclass(frozen=True)
class Counted:
    """Costs of every phase of one bundle, and the versions that ran."""

    costs: tuple[Cost, ...]
    ran: dict[str, Any]
    """kernels, python, onnxruntime, numpy, cpu, compiler, llvm_mca."""
    remark: str = ""
    """Why no cycles were predicted."""

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(cost) for cost in self.costs]


def count_bundle(machine: EmulatedMachine, package: Package, bundle: Path, scenario: Scenario) -> Counted:
    """Load and every phase on one thread. Raises UserError; IllegalInstruction for a SIGILL."""
    options = json.dumps(asdict(scenario))
    arguments = ["-m", "microvlm.bench.pi.counting.counted_model", str(bundle.resolve()), options]
    ran, regions = count(machine, arguments, CountedModel)
    if not ran.finite:
        raise UserError(f"{bundle.name} on the emulated {machine.cpu} gives logits that are not numbers.")
    missing = {number for marked in ran.regions.values() for number in marked.regions} - set(regions)
    if missing:
        raise UserError(
            f"the emulated {machine.cpu} printed no counts of {len(missing)} regions: run it again."
        )
    # The plugin lists what the library executed in the last region of a phase: the same code as in the others.
    cycles, remark = _cycles([regions[marked.regions[-1]] for marked in ran.regions.values()], machine.cpu)
    costs = [
        _cost(
            phase,
            [regions[number] for number in marked.regions],
            marked.repeats,
            weight_bytes(bundle, phase),
            of_phase,
        )
        for (phase, marked), of_phase in zip(ran.regions.items(), cycles, strict=True)
    ]
    versions = {name: value for name, value in msgspec.structs.asdict(ran).items() if name != "regions"}
    tools = {"cpu": machine.cpu, "compiler": package.compiler, "llvm_mca": mca_core.version()}
    return Counted(tuple(costs), {**versions, **tools}, remark)


def weight_bytes(bundle: Path, phase: str) -> int:
    """Bytes of the bundle that a phase reads once: graphs, their weights, and for the decoder the head's whole table.

    Loading reads every graph and no weights: they stay mapped. A token's own row of the table is left out.
    """
    folder = bundle / "onnx"
    if phase == "load":
        return sum(path.stat().st_size for path in folder.glob("*.onnx"))
    names = [f"{graph}{suffix}" for graph in GRAPHS[phase] for suffix in (".onnx", ".data")]
    names += [EMBEDDING] if "decoder_model_merged" in GRAPHS[phase] else []
    names = [name for name in names if not name.startswith("embed_tokens")]
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def _cycles(regions: list[Region], cpu: str) -> tuple[list[Cycles | None], str]:
    """Predicted cycles of each region, or None for each and why."""
    nothing: list[Cycles | None] = [None] * len(regions)
    if cpu != mca_core.CPU:
        return nothing, f"no cycles are predicted of a {cpu}: the timings are of a {mca_core.CPU}."
    if shutil.which(kernel_cycles.DISASSEMBLER) is None:
        return (
            nothing,
            f"no cycles are predicted without {kernel_cycles.DISASSEMBLER}: apt-get install {BINUTILS}.",
        )
    try:
        return list(kernel_cycles.predict_cycles([region.steps for region in regions])), ""
    except UserError as error:
        return nothing, f"no cycles are predicted: {error}"


def _cost(phase: str, regions: list[Region], repeats: int, weights: int, cycles: Cycles | None) -> Cost:
    """The median of each figure over the regions, divided by how often each did the phase."""
    total, simd, library, crypto = (
        round(median([getattr(region, figure) for region in regions]) / repeats) for figure in FIGURES
    )
    timings, mca = (None, None) if cycles is None else (cycles.timings, cycles.mca)
    by_table = (None if each is None else round(each / repeats) for each in (timings, mca))
    return Cost(phase, total, simd, weights, library, crypto, *by_table)
