"""`microvlm-bench memory`: writes facts into a model's memory, scores and times it, and makes the document."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microvlm.backends import get_backend, load
from microvlm.backends.base import LoadedRuntime
from microvlm.bench.memory.costs import bars, latency_ms, measured_shares, predicted, timings
from microvlm.bench.memory.drift import drift
from microvlm.bench.memory.edits import edit
from microvlm.bench.memory.fact_sets import NAMES, deal
from microvlm.bench.memory.memoryset_reader import load_memoryset
from microvlm.bench.memory.model_under_test import ModelUnderTest
from microvlm.bench.memory.open_values.open_value_scores import open_value_scores
from microvlm.bench.memory.other_vendor import other_vendor
from microvlm.bench.memory.personalisation.concept_bench import personalisation
from microvlm.bench.memory.personalisation.concept_sets import built_in_concepts, concepts_of_folder
from microvlm.bench.memory.personalisation.fact_stream import fact_stream
from microvlm.bench.memory.scores import Encoded, addressing, forget, gate, recall_curve, sequential
from microvlm.bench.provenance import describe_model, kernels_of, provenance
from microvlm.bench.speed.harness import Progress
from microvlm.errors import UserError
from microvlm.formats.bundle import is_bundle
from microvlm.formats.manifest import read_manifest
from microvlm.inputs.processor import Processor
from microvlm.presets import preset
from microvlm.sources.model_source import DEFAULT_MODEL, warn_of_folder

MOST_OPEN = 192
"""Objects that facts with open values are about."""
DRAWN_STEPS = 64
"""Most rows of the addressing heatmap, which the document carries."""
RANDOM_MODEL = "full"
"""Name, in `costs`, of a full-size model with random weights."""


@dataclass(frozen=True)
class Options:
    """Spelled as the flags of the command."""

    model: str = DEFAULT_MODEL
    backend: str = "ort"
    threads: int = 1
    facts: int = 0
    """Most facts written at once; 0 takes four times the slots, or as many as the evaluation set gives."""
    edits: int = 1000
    repeats: int = 20
    seed: int = 0
    costs: bool = False
    """Time and count only; an untrained model is enough."""
    concepts: tuple[int, ...] = ()
    """Numbers of named concepts that are told from strangers."""
    concept_pictures: Path | None = None
    """A folder with a sub-folder of pictures for each concept; None takes the package's drawings."""
    stream: int = 0
    """Facts that are written one after another, some of them forgotten."""
    tune: int | None = None
    """Facts that are also trained into the decoder; None takes five where torch is installed, 0 none."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--facts", self.facts, 0),
            ("--edits", self.edits, 1),
            ("--repeats", self.repeats, 1),
            ("--tune", self.tune or 0, 0),
            ("--stream", self.stream, 0),
            ("--concepts", min(self.concepts, default=1), 1),
        ):
            if value < least:
                raise UserError(f"{flag} is {value}; give {least} or more.")
        if 0 < self.facts < 8:
            raise UserError(f"--facts is {self.facts}; give 8 or more.")
        if self.tune and not _has_torch():
            raise UserError(
                "--tune trains with torch, which is not installed; pip install 'microvlm[export]'."
            )


def run_each(
    models: Sequence[str], backends: Sequence[str], options: Options, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """One document for one model on one backend; of several, `subjects`: a document for each. Raises UserError."""
    for backend in backends:
        reason = get_backend(backend).unavailable()
        if reason is not None:
            raise UserError(f"backend '{backend}' cannot run here: {reason}")
    pairs = [(model, backend) for model in models for backend in backends]
    documents = []
    for model, backend in pairs:
        if len(pairs) > 1:
            progress(f"{model} on {backend}")
        documents.append(run(dataclasses.replace(options, model=model, backend=backend), progress))
    if len(documents) == 1:
        return documents[0]
    for number, document in enumerate(documents):
        if document["label"] in [other["label"] for other in documents[:number]]:
            document["label"] += f"-{number + 1}"
    return {"report": "memory", "subjects": documents, "provenance": documents[0]["provenance"]}


def run(options: Options, progress: Progress = lambda _: None) -> dict[str, Any]:
    """The document of `--json`. Raises UserError for a model or backend that can't be had."""
    began = time.perf_counter()
    runtime = load(options.backend, _source(options, progress), options.threads)
    scored = {} if options.costs else score(runtime, options, progress)
    scored |= personalise(runtime, options, progress)
    progress("timing")
    times = timings(runtime, options.repeats, options.seed)
    measured = measured_shares(times)
    name = runtime.directory.name
    return {
        "report": "memory",
        "label": f"{name}-{options.backend}",
        "slots": runtime.config.memory.slots,
        **scored,
        "latency_ms": latency_ms(times),
        "costs": {
            "measured": measured,
            "bars": bars(runtime.config, measured),
            "sizes": [
                predicted(config)
                for config in (runtime.config, preset("full"))
                if config is runtime.config or runtime.config.name != config.name
            ],
        },
        "backend": options.backend,
        "kernels": kernels_of(runtime),
        "precision": precision(runtime),
        "seconds": round(time.perf_counter() - began, 2),
        "provenance": provenance(describe_model(runtime.directory), options.threads),
    }


def score(runtime: LoadedRuntime, options: Options, progress: Progress) -> dict[str, Any]:
    """Every table that is a share of right answers, the drift, and how the slots were used."""
    model = ModelUnderTest(runtime, Processor.from_pretrained(runtime.directory))
    slots = model.slots
    progress("encoding the facts")
    encoded = Encoded(model, deal(load_memoryset(), options.facts or 4 * slots, options.seed))
    count, objects = len(encoded.facts), len({fact.object for fact in encoded.facts})
    half = min(slots // 2, count)
    tables: dict[str, Any] = {"chance": 1 / len(NAMES)}
    progress("recall against the number of facts")
    tables["recall"] = recall_curve(model, encoded, fact_counts(slots, count))
    progress("another vendor's drawings")
    tables["other_vendor"] = other_vendor(model, encoded, half)
    progress("one-shot edits and their neighbours")
    tables["edit"] = edit(model, encoded, min(50, count), min(slots // 2, objects // 2))
    progress("forgetting")
    tables["forget"] = forget(model, encoded, min(slots, count))
    progress(f"{options.edits} edits in sequence")
    tables["sequential"] = sequential(model, encoded, half, options.edits, options.seed)
    progress("the scope gate")
    tables["gate"] = gate(model, encoded, min(slots, count // 4))
    tables["addressing"] = addressing(model, encoded, min(slots, count, DRAWN_STEPS))
    progress("values that no training saw")
    tables["open_values"] = open_value_scores(model, options.facts or MOST_OPEN, options.seed)
    progress("drift")
    tables["drift"] = drift(runtime, encoded.keys, encoded.values, seed=options.seed)
    if options.tune != 0 and _has_torch():
        tables |= _tuned(model, encoded, options, progress)
    return tables


def personalise(runtime: LoadedRuntime, options: Options, progress: Progress) -> dict[str, Any]:
    """`concepts` and `stream`, where they are asked for. Raises UserError."""
    if not options.concepts and not options.stream:
        return {}
    model = ModelUnderTest(runtime, Processor.from_pretrained(runtime.directory))
    concepts = (
        built_in_concepts(options.seed)
        if options.concept_pictures is None
        else concepts_of_folder(options.concept_pictures, runtime.config.vision, options.seed)
    )
    tables: dict[str, Any] = {}
    if options.concepts:
        tables["concepts"] = personalisation(model, concepts, sorted(set(options.concepts)), progress)
    if options.stream:
        tables["stream"] = fact_stream(model, concepts.scored, options.stream, options.seed, progress)
    return tables


def _tuned(model: ModelUnderTest, encoded: Encoded, options: Options, progress: Progress) -> dict[str, Any]:
    """`tuning`, or nothing where torch can't load this model and nobody asked for it."""
    from microvlm.bench.memory.tuning import tuning

    progress("training facts into the decoder")
    count = min(options.tune or 5, len(encoded.facts))
    try:
        return {"tuning": tuning(model, encoded, options.model, count, options.threads)}
    except UserError as error:
        if options.tune:
            raise
        progress(f"left out: {error}")
        return {}


def fact_counts(slots: int, most: int) -> list[int]:
    """An eighth of the slots to four times as many, doubling, as far as there are facts; `most` is the last."""
    counts = [slots * eighths // 8 for eighths in (1, 2, 4, 8, 16, 32)]
    return sorted({count for count in counts if 0 < count <= most} | {most})


def precision(runtime: LoadedRuntime) -> dict[str, Any]:
    """Bits of the decoder's linears and of the token table, as stored: of a bundle by its manifest."""
    if is_bundle(runtime.directory):
        manifest = read_manifest(runtime.directory)
        return {name: getattr(manifest, key) for name, key in _PRECISION.items()}
    widths = runtime.config.quantization
    return {"decoder_bits": widths.decoder_bits, "embedding_bits": widths.embedding_bits, "packing": None}


_PRECISION = {"decoder_bits": "bits", "embedding_bits": "embedding_bits", "packing": "packing"}


def _source(options: Options, progress: Progress) -> str | Path:
    if options.costs and options.model == RANDOM_MODEL:
        warn_of_folder(RANDOM_MODEL)
        from microvlm.bench.full.random_bundle import random_full_bundle

        return random_full_bundle(progress)
    return options.model


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None
