"""`microvlm-bench full`: prefill and decode of a full-size decoder on ONNX Runtime, its memory, the roofline.

The bars were set for a machine that reads 15 GB/s on one thread, and scale with what this one reads in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.bench.provenance import describe_model, provenance
from microvlm.bench.records import Figure, PositiveFigure
from microvlm.bench.roofline import StreamingRoofline, share
from microvlm.bench.speed.harness import Memory, Progress, WorkerFailed, WorkerProcess, bytes_of
from microvlm.bench.speed.lengths import check_length
from microvlm.bench.speed.speed_bench import bytes_read_per_token
from microvlm.bench.stats import median, summarise
from microvlm.errors import UserError
from microvlm.formats.bundle import open_bundle
from microvlm.inputs.tokenizer_tables import TOKENIZER

PROMPT_TOKENS = 64
BAR_GB_PER_S = 15.0
BAR_DECODE_TOKENS_PER_S = 45.0
BAR_PREFILL_TOKENS_PER_S = 110.0
BAR_ANONYMOUS_BYTES = 60_000_000
_WORKER = [sys.executable, "-P", "-m", "microvlm.bench.full.decoder_worker"]


class DecoderLoaded(msgspec.Struct, frozen=True):
    """The worker's answer to `load`."""

    load_ms: Figure
    kernels: str
    memory_before: Memory


class Round(msgspec.Struct, frozen=True):
    """The worker's answer to `round`."""

    prefill_ms: PositiveFigure
    decode_ms: Annotated[list[PositiveFigure], Meta(min_length=1)]
    finite: bool


def run(
    bundle: Path, threads: int = 1, rounds: int = 5, new_tokens: int = 16, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """The document of `--json`. Raises UserError for a bad bundle or option, or when the decoder cannot run."""
    for flag, value in (("--threads", threads), ("--rounds", rounds), ("--new-tokens", new_tokens)):
        if value < 1:
            raise UserError(f"{flag} is {value}; give 1 or more.")
    open_bundle(bundle)
    check_length(bundle, "--new-tokens", new_tokens, PROMPT_TOKENS, images=0)
    roofline = StreamingRoofline()
    worker = WorkerProcess(_WORKER)
    try:
        loaded = worker.ask(
            DecoderLoaded, do="load", model=str(bundle), threads=threads, prompt_tokens=PROMPT_TOKENS
        )
        progress(f"decoder loaded, {loaded.kernels}")
        worker.ask(Round, do="round", new_tokens=2)
        timed = []
        for index in range(rounds):
            progress(f"round {index + 1} of {rounds}")
            roofline.sample(threads)
            timed.append(worker.ask(Round, do="round", new_tokens=new_tokens))
        memory = bytes_of(worker.ask(Memory, do="memory"))
        has_tokenizer = (bundle / TOKENIZER).is_file()
        tokenizer = bytes_of(worker.ask(Memory, do="tokenizer", model=str(bundle))) if has_tokenizer else {}
    except WorkerFailed as failure:
        raise UserError(f"the decoder of {bundle} cannot run: {failure}") from None
    finally:
        worker.close()
    return _document(bundle, threads, new_tokens, loaded, timed, memory, tokenizer, roofline)


def _document(
    bundle: Path,
    threads: int,
    new_tokens: int,
    loaded: DecoderLoaded,
    rounds: list[Round],
    memory: dict[str, int | None],
    tokenizer: dict[str, int | None],
    roofline: StreamingRoofline,
) -> dict[str, Any]:
    prefill = [answer.prefill_ms for answer in rounds]
    decode = [ms for answer in rounds for ms in answer.decode_ms]
    before = bytes_of(loaded.memory_before).get("anonymous_bytes")
    after = memory.get("anonymous_bytes")
    anonymous = None if before is None or after is None else after - before
    per_token = bytes_read_per_token(bundle)
    seconds = median(decode) * 1e-3
    stream = roofline.gb_per_s(threads)
    full = {
        "kernels": loaded.kernels,
        "load_ms": round(loaded.load_ms, 1),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": new_tokens,
        "prefill": summarise(prefill),
        "decode": summarise(decode),
        "prefill_tokens_per_s": round(PROMPT_TOKENS * 1e3 / median(prefill), 2),
        "decode_tokens_per_s": round(1 / seconds, 2),
        "weight_bytes_per_token": per_token,
        "decode_gb_per_s": round(per_token / seconds / 1e9, 2),
        "decode_roofline_share": round(share(per_token, seconds, stream), 4),
        "anonymous_of_model_bytes": anonymous,
        "tokenizer_anonymous_bytes": tokenizer.get("anonymous_bytes"),
        "file_backed_bytes": memory.get("file_backed_bytes"),
        "peak_rss_bytes": memory.get("peak_rss_bytes"),
        "finite": all(answer.finite for answer in rounds),
    }
    facts = provenance(describe_model(bundle), threads)
    return {
        "report": "full",
        "full": full,
        "bars": bars(full, threads, stream),
        "provenance": {**facts, "stream_gb_per_s": roofline.summary()},
    }


def bars(full: dict[str, Any], threads: int, stream_gb_per_s: float) -> list[dict[str, Any]]:
    """The requirements: two speeds on one thread, and memory. `met` is None where the value could not be measured."""
    anonymous = full["anonymous_of_model_bytes"]
    memory = {"name": "anonymous_of_model_bytes", "value": anonymous, "at_most": BAR_ANONYMOUS_BYTES}
    table = [{**memory, "met": None if anonymous is None else anonymous <= BAR_ANONYMOUS_BYTES}]
    if threads != 1:
        return table
    for name, at_15 in (
        ("decode_tokens_per_s", BAR_DECODE_TOKENS_PER_S),
        ("prefill_tokens_per_s", BAR_PREFILL_TOKENS_PER_S),
    ):
        least = at_15 * stream_gb_per_s / BAR_GB_PER_S
        table.append(
            {"name": name, "value": full[name], "at_least": round(least, 2), "met": full[name] >= least}
        )
    return table
