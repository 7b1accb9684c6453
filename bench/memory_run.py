"""`microvlm-bench memory`: remembers facts with a model on a backend, scores and times it, and makes the document."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from microvlm.backends import load
from microvlm.bench.device import describe_model, provenance
from microvlm.bench.harness import Progress
from microvlm.bench.memory_costs import latencies, measured_shares, predicted
from microvlm.bench.memory_deck import NAMES, deal
from microvlm.bench.memory_scores import Encoded, edit, forget, gate, recall_curve, sequential
from microvlm.bench.memory_subject import Subject
from microvlm.bench.memoryset_reader import load_memoryset
from microvlm.config import preset
from microvlm.errors import UserError
from microvlm.processor import Processor


@dataclass(frozen=True)
class Options:
    """Spelled as the flags of the command."""

    model: str = "nano"
    backend: str = "ort"
    threads: int = 1
    facts: int = 0
    """Most facts written at once; 0 takes four times the slots, or as many as the evaluation set gives."""
    edits: int = 1000
    repeats: int = 20
    seed: int = 0
    costs: bool = False
    """Time and count only, which an untrained model is good enough for."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--facts", self.facts, 0),
            ("--edits", self.edits, 1),
            ("--repeats", self.repeats, 1),
        ):
            if value < least:
                raise UserError(f"{flag} is {value}; give {least} or more.")
        if 0 < self.facts < 8:
            raise UserError(f"--facts is {self.facts}; give 8 or more.")


def run(options: Options, progress: Progress = lambda _: None) -> dict[str, Any]:
    """The document of `--json`. Raises UserError for a model or backend that can't be had."""
    began = time.perf_counter()
    runtime = load(options.backend, options.model, options.threads)
    subject = Subject(runtime, Processor.from_pretrained(runtime.directory))
    progress("encoding the facts")
    most = 1 if options.costs else options.facts or 4 * subject.slots
    encoded = Encoded(subject, deal(load_memoryset(), most, options.seed))
    scored = {} if options.costs else score(subject, encoded, options, progress)
    progress("timing")
    latency_ms = latencies(subject, encoded, options.repeats)
    return {
        "slots": subject.slots,
        **scored,
        "latency_ms": latency_ms,
        "costs": {
            "measured": measured_shares(latency_ms),
            "sizes": [predicted(config) for config in (runtime.config, preset("full"))],
        },
        "backend": options.backend,
        "seconds": round(time.perf_counter() - began, 2),
        "provenance": provenance(describe_model(runtime.directory), options.threads),
    }


def score(subject: Subject, encoded: Encoded, options: Options, progress: Progress) -> dict[str, Any]:
    """Every table that is a share of right answers."""
    slots, count = subject.slots, len(encoded.facts)
    tables: dict[str, Any] = {"chance": 1 / len(NAMES)}
    progress("recall against the number of facts")
    tables["recall"] = recall_curve(subject, encoded, fact_counts(slots, count))
    progress("one-shot edits")
    tables["edit"] = edit(subject, encoded, min(50, count))
    progress("forgetting")
    tables["forget"] = forget(subject, encoded, min(slots, count))
    progress(f"{options.edits} edits in sequence")
    tables["sequential"] = sequential(subject, encoded, min(slots // 2, count), options.edits, options.seed)
    progress("the scope gate")
    tables["gate"] = gate(subject, encoded, min(slots, count // 4))
    return tables


def fact_counts(slots: int, most: int) -> list[int]:
    """An eighth of the slots to four times as many, doubling, as far as there are facts; `most` is the last."""
    counts = [slots * eighths // 8 for eighths in (1, 2, 4, 8, 16, 32)]
    return sorted({count for count in counts if 0 < count <= most} | {most})
