"""`microvlm-bench pi`: runs the requested parts and makes the document."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microvlm.backends import resolve_bundle
from microvlm.backends.arm64.targets import default_target
from microvlm.backends.arm64.transports.device_package import SWITCH
from microvlm.backends.emulation import DEFAULT_CPU
from microvlm.bench.pi import count_baseline, predict, profiles, published_results, real_board
from microvlm.bench.pi.board import memory_fit
from microvlm.bench.pi.counting import counting_emulator, emulated_package, instruction_cost, peer_counts
from microvlm.bench.pi.counting.counting_emulator import IllegalInstruction, open_board
from microvlm.bench.pi.counting.emulated_package import package_of_board, wheel_of_board
from microvlm.bench.pi.workload_phases import Scenario
from microvlm.bench.provenance import describe_model, provenance
from microvlm.bench.speed.lengths import check_length
from microvlm.bench.temporary_environment import environment
from microvlm.errors import UserError
from microvlm.presets import preset
from microvlm.sources.model_source import DEFAULT_MODEL, warn_of_folder

Progress = Callable[[str], None]
PARTS = ("equivalence", "fit", "cost", "peers")
EMULATED = "emulated"
FULL = "full"
"""A model's name: random weights at full size, with the vocabulary that the bars of a Zero 2 W are stated for."""
FULL_VOCABULARY = 50_000
FULL_BASE3 = "full-base3"
BYTE_BARS = {FULL: (118_000_000, 168_000_000), FULL_BASE3: (99_000_000, 150_000_000)}
"""Bytes of weights that a token may read: with FULL_VOCABULARY, and with all of Qwen2.5's tokens."""
PICTURE = Path(__file__).parents[1] / "evalset" / "images" / "1f41c.png"
EQUIVALENCE_IMAGES = 2
"""An episode of 20 steps comes with them; more take minutes under emulation."""


@dataclass(frozen=True)
class Options:
    """Options of one run, spelled as the flags. Raises UserError."""

    model: str = DEFAULT_MODEL
    target: str | None = None
    parts: tuple[str, ...] = ()
    profile: str = profiles.DEFAULT
    images: int = EQUIVALENCE_IMAGES
    repeats: int = 5
    scenario: Scenario = field(default_factory=Scenario)
    gate: bool = False
    update_baseline: bool = False
    baselines: Path = count_baseline.FOLDER

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"--part {part} is unknown; choose among {', '.join(PARTS)}.")
        for flag in ("images", "repeats"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} is {getattr(self, flag)}; give 1 or more.")


def run(options: Options, progress: Progress = lambda _: None) -> tuple[dict[str, Any], list[str]]:
    """The document of `--json`, and a sentence for everything that fails the gate. Raises UserError."""
    profile = profiles.load_profile(options.profile)
    target = options.target or default_target()
    if target == EMULATED and profile.cpu != DEFAULT_CPU:
        # Other cores run other kernels: a board's predictions rest on its own core's counts.
        target = f"{EMULATED}:{profile.cpu}"
    emulated = target.split(":")[0] == EMULATED
    # A whole board takes minutes and needs a wheel: it runs by default where one is set.
    usual = tuple(part for part in PARTS if part != "fit" or os.environ.get(SWITCH))
    parts = options.parts or (usual if emulated else ("equivalence",))
    if emulated and {"cost", "peers"} & set(parts):
        # Counting takes minutes: check its requirements first.
        counting_emulator.require_emulator()
        emulated_package.require_library()
    bundle = _bundle(options.model, progress)
    scenario = options.scenario
    check_length(bundle, "--answer-tokens", scenario.answer_tokens, scenario.prompt_tokens)
    document: dict[str, Any] = {"report": "pi", "target": target}
    failures: list[str] = []
    if "equivalence" in parts and options.model not in (FULL, FULL_BASE3):
        document["equivalence"], sentences = _equivalence(bundle, target, options.images, progress)
        failures += sentences
    if emulated:
        cpu = target.partition(":")[2] or DEFAULT_CPU
        _emulated_parts(document, failures, parts, bundle, cpu, profile, options, progress)
    else:
        progress(f"timing the phases on {target}")
        document |= real_board.measure(bundle, target, options.scenario, options.repeats)
    document["profile"] = profile.document()
    document["model"] = published_results.fit_document()
    document["provenance"] = provenance(describe_model(bundle), 1 if emulated else None)
    return document, failures


def _emulated_parts(
    document: dict[str, Any],
    failures: list[str],
    parts: tuple[str, ...],
    bundle: Path,
    cpu: str,
    profile: profiles.Profile,
    options: Options,
    progress: Progress,
) -> None:
    package = package_of_board()
    machine = open_board(package, cpu)
    if "cost" in parts:
        progress(f"counting instructions on an emulated {cpu}")
        try:
            counted = instruction_cost.count_bundle(machine, package, bundle, options.scenario)
        except IllegalInstruction as illegal:
            failures.append(f"cost: {illegal}")
            return
        document["cost"], document["counted_on"] = counted.rows(), counted.ran
        bundle_bytes = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        predicted = predict.predict(counted.costs, profile, options.scenario, bundle_bytes)
        document["predicted_ms"] = [time.row() for time in predicted]
        by_tables = predict.predict_by_tables(counted.costs, profile, options.scenario, bundle_bytes)
        document |= {f"predicted_{table}_ms": [t.row() for t in times] for table, times in by_tables.items()}
        if counted.remark:
            progress(counted.remark)
        if options.model in (FULL, FULL_BASE3):
            document["bars"] = [*predict.bars(predicted), *_byte_bars(counted, options.model, bundle)]
        key = count_baseline.key_of(counted, bundle)
        if options.update_baseline:
            path = count_baseline.write(bundle_name(options.model), key, counted.costs, options.baselines)
            progress(f"wrote {path}")
        elif options.gate:
            changes = count_baseline.check(bundle_name(options.model), key, counted.costs, options.baselines)
            failures += [f"cost: {sentence}" for sentence in changes]
    if "fit" in parts:
        progress("captioning and chatting in an emulated board with 512 and 448 MB")
        name = bundle_name(options.model)
        full = options.model in (FULL, FULL_BASE3)
        subjects = [
            memory_fit.full_size_model(name, bundle) if full else memory_fit.FittedModel(name, bundle)
        ]
        document["fit"] = memory_fit.measure_fit(subjects, PICTURE, wheel_of_board())
        failures += [
            f"fit: {sentence}" for sentence in memory_fit.complaints(subjects, document["fit"]["runs"])
        ]
    if "peers" in parts:
        progress("counting ONNX Runtime's own paths at full size")
        document.setdefault("counted_on", {"cpu": cpu, "compiler": package.compiler})
        document["peers"] = peer_counts.count_peers(machine, cpu, progress, options.baselines)
        document["bars"] = [*document.get("bars", []), *peer_counts.bars(document["peers"])]


def bundle_name(model: str) -> str:
    """Name of a model's baseline: without folder and widths, but base 3 has other graphs and its own."""
    return model if model == FULL_BASE3 else Path(model).name.split("-")[0]


def _byte_bars(counted: instruction_cost.Counted, model: str, bundle: Path) -> list[dict[str, Any]]:
    """Bars for the bytes of the files as they are, and with the token rows that were cut (the table is row-major)."""
    weights = next(cost.weight_bytes for cost in counted.costs if cost.phase == "decode")
    table = (bundle / "onnx" / instruction_cost.EMBEDDING).stat().st_size
    whole = weights + (preset("full").text.vocab_size - FULL_VOCABULARY) * table // FULL_VOCABULARY
    return [
        {"name": name, "value": value, "at_most": at_most, "met": value <= at_most}
        for name, value, at_most in zip(
            ("weight_bytes_per_token", "weight_bytes_per_token with the whole vocabulary"),
            (weights, whole),
            BYTE_BARS[model],
            strict=True,
        )
    ]


def _bundle(model: str, progress: Progress) -> Path:
    if model not in (FULL, FULL_BASE3):
        return resolve_bundle(model)
    warn_of_folder(model)
    from microvlm.bench.full.random_bundle import random_full_bundle

    packing = "base3" if model == FULL_BASE3 else "2bit"
    return random_full_bundle(progress, packing, FULL_VOCABULARY)


def _equivalence(
    bundle: Path, target: str, images: int, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """`ort-arm64` on the target against torch, and against `ort` here: the first document, with the second in it."""
    from microvlm.bench.equivalence.equivalence_bench import Options as Compared
    from microvlm.bench.equivalence.equivalence_bench import run as compare

    documents, failures = {}, []
    with environment("MICROVLM_TARGET", target):
        for reference in ("torch", "ort"):
            progress(f"ort-arm64 on {target} against {reference}")
            options = Compared(
                model=str(bundle), reference=reference, candidate="ort-arm64", images=images, threads=1
            )
            documents[reference], verdict = compare(options, progress)
            if verdict.exit_status:
                failures.append(f"equivalence with {reference}: {'; '.join(verdict.reasons)}")
    return {**documents["torch"], "against_ort": documents["ort"]}, failures
