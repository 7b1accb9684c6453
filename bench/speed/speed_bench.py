"""`microvlm-bench run`: measures every backend and makes the document, the physical ceiling beside the decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from microvlm.backends import backend_names, resolve_bundle
from microvlm.backends.arm64.targets import default_target
from microvlm.backends.emulation import DEFAULT_CPU
from microvlm.bench.equivalence.samples import choose
from microvlm.bench.equivalence.verdict import FAIL
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.pi.emulated_entry import BACKEND, emulated_entry
from microvlm.bench.provenance import describe_model, provenance, streaming_read_bytes_per_s
from microvlm.bench.speed.harness import BackendRun, Plan, Progress, measure
from microvlm.bench.speed.lengths import check_length
from microvlm.bench.speed.phases import PHASES, Workload
from microvlm.bench.stats import median, ratio_of_medians, summarise
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.bundle import open_bundle
from microvlm.inputs.processor import Processor

EMULATED = "emulated"
IMAGES = 8
"""Number of evaluation images, photographs for a model that sees them; repeats cycle through them."""
_MEMORY_FIELDS = ("peak_rss_bytes", "rss_bytes", "anonymous_bytes", "file_backed_bytes", "pss_bytes")


def run(
    models: Sequence[str],
    backends: Sequence[str] = (),
    threads: int = 1,
    repeats: int = 10,
    warmup: int = 2,
    new_tokens: int = 16,
    device: str = "cpu",
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """The document of `--json`; several models are compared like several backends.

    Raises UserError for a model or backend name that can't be had.
    """
    if new_tokens < 1:
        raise UserError(f"--new-tokens is {new_tokens}; give 1 or more.")
    if device != "cpu" and list(backends) != ["torch"]:
        raise UserError(f"--device {device} is for backend torch alone: give --backend torch too.")
    bundles = [_checked(resolve_bundle(model)) for model in models]
    for bundle in bundles[1:]:
        check_length(bundle, "--new-tokens", new_tokens)
    workload = measured_workload(bundles[0], new_tokens)
    plan = Plan(asdict(workload), threads, repeats, warmup, device=device)
    # Without a choice PyTorch comes first, so that the ratios are against the reference.
    names = list(dict.fromkeys(backends)) or sorted(backend_names(), key=lambda name: (name != "torch", name))
    cpu = _emulated_cpu() if BACKEND in names else None
    runs = measure([name for name in names if name != BACKEND or cpu is None], bundles, plan, progress)
    progress("reading memory at full speed, for the ceiling")
    bandwidth = streaming_read_bytes_per_s()
    described = [describe_model(bundle) for bundle in bundles]
    results = [result(run, bandwidth) for run in runs]
    if cpu is not None:
        results += [_emulated_result(bundle, cpu, len(bundles) > 1, progress) for bundle in bundles]
    return {
        "report": "run",
        "results": results,
        "ratios": ratios(runs),
        "ceiling": {"read_bandwidth_bytes_per_s": round(bandwidth), "threads": 1},
        "workload": {
            "images": len(workload.images),
            "new_tokens": new_tokens,
            "warmup": warmup,
            "repeats": repeats,
            "loads": plan.loads,
            "device": device,
        },
        "provenance": {**provenance(described[0], threads), "models": described},
    }


def _emulated_cpu() -> str | None:
    """The core that `ort-arm64` is emulated on here; None where it runs on a device, whose times are measured."""
    try:
        kind, _, cpu = default_target().partition(":")
    except UserError:
        kind, cpu = EMULATED, ""  # without an emulator, a committed baseline may still have the counts
    return (cpu or DEFAULT_CPU) if kind == EMULATED else None


def _emulated_result(bundle: Path, cpu: str, several: bool, progress: Progress) -> dict[str, Any]:
    """An entry without measured times. `status`: `counted`, `skipped` without counts, `failed` if not equivalent."""
    entry = emulated_entry(bundle, cpu, progress)
    run = BackendRun(BACKEND, bundle, f"{bundle.name}, {BACKEND}" if several else BACKEND)
    run.status = "skipped" if entry["counted_instructions"] is None else "counted"
    run.reason = "; ".join(entry["missing"]) or None
    compared = entry["equivalence"]
    if compared is not None and compared["verdict"] == FAIL:
        run.status, run.reason = "failed", "; ".join(compared["reasons"])
    return {**result(run, 1.0), "emulated": entry}


def _checked(bundle: Path) -> Path:
    """The bundle, after a check that its files are intact and that it has a tokenizer. Raises UserError."""
    open_bundle(bundle)
    Processor.from_pretrained(bundle)
    return bundle


def measured_workload(bundle: Path, new_tokens: int) -> Workload:
    """The pictures and texts to time a bundle on. Raises UserError for more tokens than it has positions for."""
    check_length(bundle, "--new-tokens", new_tokens)
    samples = choose(load_evalset(), MicroVLMConfig.load(bundle), IMAGES, 0, photograph_share=1.0)
    images = tuple(str(sample.images[0]) for sample in samples)
    return Workload(images, tuple(sample.answer for sample in samples), new_tokens=new_tokens)


def result(run: BackendRun, bandwidth: float) -> dict[str, Any]:
    """The report's entry of one backend. Where it did not run, fields are null and `reason` says why.

    The ceiling is what one core could decode if it did nothing but read the weights from memory.
    """
    read_per_token = bytes_read_per_token(run.model)
    phases: dict[str, dict[str, Any]] = {
        name: {
            **summarise(run.milliseconds[name]),
            "samples_ms": [round(value, 5) for value in run.milliseconds[name]],
        }
        for name in PHASES
        if run.milliseconds.get(name)
    }
    decode = phases.get("decode")
    tokens_per_s = 1e3 / decode["median_ms"] if decode and decode["median_ms"] else None
    before = run.memory_before_load.get("anonymous_bytes")
    after = run.memory.get("anonymous_bytes")
    return {
        "backend": run.backend,
        "model": run.model.name,
        "label": run.label,
        "status": run.status,
        "reason": run.reason,
        "path": run.path,
        "phases": phases,
        "decode_tokens_per_s": None if tokens_per_s is None else round(tokens_per_s, 2),
        "weight_bytes_per_token": read_per_token,
        "predicted_ceiling_tokens_per_s": round(bandwidth / read_per_token, 1) if read_per_token else None,
        "decode_share_of_ceiling": (
            None if tokens_per_s is None else round(tokens_per_s * read_per_token / bandwidth, 4)
        ),
        **{name: run.memory.get(name) for name in _MEMORY_FIELDS},
        "anonymous_of_model_bytes": None if before is None or after is None else after - before,
        "import_ms": round(median(run.import_ms), 1) if run.import_ms else None,
    }


def ratios(runs: Sequence[BackendRun]) -> list[dict[str, Any]]:
    """Every backend that ran against the first that did: median time over median time, with a 95 % interval."""
    finished = [run for run in runs if run.status == "ok"]
    table = []
    for run in finished[1:]:
        for phase in PHASES:
            times, base = run.milliseconds.get(phase), finished[0].milliseconds.get(phase)
            if not times or not base or len(times) != len(base):
                continue
            interval = ratio_of_medians(times, base)
            table.append(
                {
                    "phase": phase,
                    "backend": run.label,
                    "against": finished[0].label,
                    **{key: round(value, 4) for key, value in interval._asdict().items()},
                }
            )
    return table


def bytes_read_per_token(bundle: Path) -> int:
    """Bytes of weights that one decoded token must read: the decoder's own, and the tied head's whole table.

    A token's embedding is one row of the same table, and the KV cache of a short answer is small beside both.
    """
    folder = bundle / "onnx"
    names = ("decoder_model_merged.onnx", "decoder_model_merged.data", "embedding.data")
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
