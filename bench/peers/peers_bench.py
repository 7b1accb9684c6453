"""`microvlm-bench peers`: makes the document of speeds, memory and ratios to ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from microvlm.bench.peers.contender_list import given_contenders, random_contenders
from microvlm.bench.peers.peer_turns import (
    DECODE,
    PHASES,
    PREFILL,
    PROMPT_TOKENS,
    PeerPlan,
    PeerRun,
    take_turns,
)
from microvlm.bench.provenance import describe_model, provenance
from microvlm.bench.speed.lengths import check_length
from microvlm.bench.stats import bootstrap, ratio_of_medians
from microvlm.errors import UserError

_CONTEXT = 256
"""Positions that llama.cpp gets."""


def run(
    models: Sequence[str],
    ggufs: Sequence[str] = (),
    checkpoint: str | None = None,
    compiled: bool = True,
    plan: PeerPlan | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The document of `--json`; without `models` it is of the full size with random weights.

    Raises UserError for files that cannot be compared.
    """
    plan = plan or PeerPlan()
    if not models and (ggufs or checkpoint):
        raise UserError("--gguf and --checkpoint stand beside a bundle of the same shape: give one.")
    if plan.new_tokens > _CONTEXT - PROMPT_TOKENS - 2:
        raise UserError(f"--new-tokens is {plan.new_tokens}; give {_CONTEXT - PROMPT_TOKENS - 2} or less.")
    if models:
        given = given_contenders(models, ggufs, checkpoint, compiled, progress)
    else:
        given = random_contenders(compiled, progress)
    contenders, config, bundle = given
    text = config.text
    check_length(bundle, "--new-tokens", plan.new_tokens, PROMPT_TOKENS, images=0)
    runs = take_turns(contenders, plan, progress)
    facts = provenance(describe_model(bundle), None)
    return {
        "report": "peers",
        "shape": {
            "name": config.name,
            "layers": text.num_hidden_layers,
            "width": text.hidden_size,
            "inner_width": text.intermediate_size,
            "vocabulary": text.vocab_size,
            "random": not models,
        },
        "workload": {
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": plan.new_tokens,
            "rounds": plan.rounds,
        },
        "rows": [_row(run) for run in runs],
        "ratios": ratios(runs),
        "provenance": {**facts, "threads": list(plan.threads)},
    }


def _row(run: PeerRun) -> dict[str, Any]:
    """A program at one number of threads. Where it did not run, figures are null and `reason` says why."""
    contender, loaded = run.contender, run.loaded
    ok = run.status == "ok"
    read = contender.weight_bytes
    if read is None and loaded is not None:
        read = loaded.weight_bytes
    return {
        "name": contender.name,
        "is_ours": contender.is_ours,
        "threads": run.threads,
        "status": run.status,
        "reason": run.reason,
        "version": loaded.version if loaded else None,
        "kernels": loaded.kernels if loaded else None,
        "weights": contender.weights,
        "file": contender.file,
        "weight_bytes_per_token": read,
        "prefill_tokens_per_s": _speed(run.milliseconds[PREFILL], PROMPT_TOKENS) if ok else None,
        "decode_tokens_per_s": _speed(run.milliseconds[DECODE], 1) if ok else None,
        "peak_rss_bytes": run.memory.get("peak_rss_bytes") if ok else None,
        "samples_ms": {phase: [round(v, 4) for v in run.milliseconds[phase]] for phase in PHASES}
        if ok
        else {},
    }


def _speed(milliseconds: Sequence[float], tokens: int) -> dict[str, float]:
    """Tokens a second of the median round, and its 95 % interval over rounds."""
    rows = np.asarray(milliseconds, np.float64)
    speed = bootstrap(lambda part: tokens * 1e3 / float(np.median(part)), rows)
    return {name: round(value, 3) for name, value in speed._asdict().items()}


def ratios(runs: Sequence[PeerRun]) -> list[dict[str, Any]]:
    """Speed over the speed of each of our own rows with as many threads: 2 is twice as fast. Rounds are pairs."""
    finished = [run for run in runs if run.status == "ok"]
    table = []
    for ours in finished:
        for run in finished:
            if not ours.contender.is_ours or run.threads != ours.threads or run is ours:
                continue
            for phase in PHASES:
                interval = ratio_of_medians(ours.milliseconds[phase], run.milliseconds[phase])
                table.append(
                    {
                        "name": run.contender.name,
                        "against": ours.contender.name,
                        "threads": run.threads,
                        "phase": phase,
                        **{key: round(value, 4) for key, value in interval._asdict().items()},
                    }
                )
    return table
