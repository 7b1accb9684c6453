"""`microvlm-bench run`: measures every backend and makes the document, the physical ceiling beside the decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from microvlm.backends import backend_names, resolve_bundle
from microvlm.bench.device import describe_model, provenance, streaming_read_bytes_per_s
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.harness import BackendRun, Plan, Progress, measure
from microvlm.bench.phases import PHASES, Workload
from microvlm.bench.samples import CAPTION, choose
from microvlm.bench.stats import median, ratio_of_medians, summarise
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError

IMAGES = 8
"""Evaluation images that the repeats go round."""
_MEMORY_FIELDS = ("peak_rss_bytes", "rss_bytes", "anonymous_bytes", "file_backed_bytes", "pss_bytes")


def run(
    model: str,
    backends: Sequence[str] = (),
    threads: int = 1,
    repeats: int = 10,
    warmup: int = 2,
    new_tokens: int = 16,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """The document of `--json`. Raises UserError for a model or backend name that can't be had."""
    if new_tokens < 1:
        raise UserError(f"--new-tokens is {new_tokens}; give 1 or more.")
    bundle = resolve_bundle(model)
    evalset = load_evalset()
    config = MicroVLMConfig.load(bundle)
    chosen = [sample for sample in choose(evalset, config, IMAGES, 0) if sample.kind == CAPTION]
    workload = Workload(
        tuple(str(sample.images[0]) for sample in chosen),
        tuple(sample.answer for sample in chosen),
        new_tokens=new_tokens,
    )
    plan = Plan(bundle, asdict(workload), threads, repeats, warmup)
    # Without a choice PyTorch comes first, so that the ratios are against the reference.
    names = list(dict.fromkeys(backends)) or sorted(backend_names(), key=lambda name: (name != "torch", name))
    runs = measure(names, plan, progress)
    described = describe_model(bundle)
    progress("reading memory at full speed, for the ceiling")
    bandwidth = streaming_read_bytes_per_s()
    read_per_token = bytes_read_per_token(bundle)
    return {
        "results": [result(one, bandwidth, read_per_token) for one in runs],
        "ratios": ratios(runs),
        "ceiling": {
            "read_bandwidth_bytes_per_s": round(bandwidth),
            "weight_bytes_per_token": read_per_token,
            "predicted_decode_tokens_per_s": round(bandwidth / read_per_token, 1) if read_per_token else None,
        },
        "workload": {
            "images": len(chosen),
            "new_tokens": new_tokens,
            "warmup": warmup,
            "repeats": repeats,
            "loads": plan.loads,
        },
        "provenance": provenance(described, threads),
    }


def result(one: BackendRun, bandwidth: float, read_per_token: int) -> dict[str, Any]:
    """One backend's entry. Fields of a backend that did not run are null, and `reason` says why."""
    phases = {name: summarise(one.milliseconds[name]) for name in PHASES if one.milliseconds.get(name)}
    decode = phases.get("decode")
    tokens_per_s = 1e3 / decode["median_ms"] if decode and decode["median_ms"] else None
    before = one.memory_before_load.get("anonymous_bytes")
    after = one.memory.get("anonymous_bytes")
    return {
        "backend": one.backend,
        "status": one.status,
        "reason": one.reason,
        "path": one.path,
        "phases": phases,
        "decode_tokens_per_s": None if tokens_per_s is None else round(tokens_per_s, 2),
        "decode_share_of_ceiling": (
            None if tokens_per_s is None else round(tokens_per_s * read_per_token / bandwidth, 4)
        ),
        **{name: one.memory.get(name) for name in _MEMORY_FIELDS},
        "anonymous_of_model_bytes": None if before is None or after is None else after - before,
        "import_ms": round(median(one.import_ms), 1) if one.import_ms else None,
    }


def ratios(runs: Sequence[BackendRun]) -> list[dict[str, Any]]:
    """Every backend that ran against the first that did: median time over median time, with a 95 % interval."""
    finished = [one for one in runs if one.status == "ok"]
    table = []
    for one in finished[1:]:
        for phase in PHASES:
            ours, base = one.milliseconds.get(phase), finished[0].milliseconds.get(phase)
            if not ours or not base or len(ours) != len(base):
                continue
            interval = ratio_of_medians(ours, base)
            table.append(
                {
                    "phase": phase,
                    "backend": one.backend,
                    "against": finished[0].backend,
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
