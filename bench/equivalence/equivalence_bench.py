"""`microvlm-bench equivalence`: loads two models, compares and judges them, and writes the report."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microvlm.backends import load, resolve_bundle
from microvlm.bench.equivalence.compare import ModelUnderTest, Pair, Progress, compare
from microvlm.bench.equivalence.metrics import Drift, Metrics
from microvlm.bench.equivalence.samples import EPISODE_STEPS, choose, longest_episode
from microvlm.bench.equivalence.verdict import Verdict, judge, judge_precision
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.provenance import describe_model, kernels_of, provenance
from microvlm.bench.stats import paired_difference, percentile
from microvlm.errors import UserError
from microvlm.exporters.replay.differences import Differences
from microvlm.inputs.processor import Processor
from microvlm.sources.model_source import DEFAULT_MODEL

if TYPE_CHECKING:
    from microvlm.model.microvlm import MicroVLM

SAME_FUNCTION = "is the backend right?"
PRECISION = "what did storing it narrower cost?"


@dataclass(frozen=True)
class Options:
    """Options of one comparison."""

    model: str = DEFAULT_MODEL
    against: str | None = None
    """A second model: the candidate's."""
    reference: str = "torch"
    candidate: str = "ort"
    images: int = 60
    scenes: int | None = None
    """Number of scene questions; None for as many as images."""
    threads: int | None = None
    new_tokens: int = 16
    episode_steps: int = EPISODE_STEPS
    """Most images of the episode."""
    evalset: str | None = None

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"--images is {self.images}; give 1 or more.")
        if self.new_tokens < 1:
            raise UserError(f"--new-tokens is {self.new_tokens}; give 1 or more.")
        if self.against is None and self.reference == self.candidate:
            raise UserError(
                f"--reference and --candidate are both '{self.reference}': choose two backends, or give --against."
            )


def run(options: Options, progress: Progress = lambda _: None) -> tuple[dict[str, Any], Verdict]:
    """The report of `--json` and the verdict. Raises UserError for a model or backend that cannot be loaded."""
    began = time.perf_counter()
    evalset = load_evalset(options.evalset)
    first = resolve_bundle(options.model)
    second = first if options.against is None else resolve_bundle(options.against)
    same = options.against is None or same_bundles(first, second)
    not_replayed = None if same else "other weights have other int8 activations"
    reference, candidate = (
        ModelUnderTest(f"backend '{backend}'", load(backend, model, options.threads), not_replayed)
        for backend, model in ((options.reference, first), (options.candidate, second))
    )
    processor = _shared_processor(first, second)
    config = reference.runtime.config
    pair = Pair(reference, candidate, processor, options.new_tokens)
    scenes = options.images if options.scenes is None else options.scenes
    samples = choose(evalset, config, options.images, scenes)
    episode = longest_episode(evalset, config, options.episode_steps)
    metrics = compare(pair, samples, episode, progress)
    difference = paired_difference(metrics.scores.candidate, metrics.scores.reference)
    verdict = judge(metrics) if same else judge_precision(metrics, difference)
    document = {
        "report": "equivalence",
        "verdict": verdict.verdict,
        "reasons": verdict.reasons,
        "question": SAME_FUNCTION if same else PRECISION,
        "reference": _side(options.reference, first, reference),
        "candidate": _side(options.candidate, second, candidate),
        **figures(metrics),
        "accuracy_difference": difference._asdict(),
        "seconds": round(time.perf_counter() - began, 2),
        "provenance": provenance(describe_model(first), options.threads),
    }
    if second != first:
        document["provenance"]["against"] = describe_model(second)
    return document, verdict


def _side(backend: str, path: Path, model: ModelUnderTest) -> dict[str, str]:
    return {"backend": backend, "model": path.name, "kernels": kernels_of(model.runtime)}


def figures(metrics: Metrics) -> dict[str, Any]:
    """The measured part of the report. A figure that is not finite is null."""
    free, differences = metrics.free, metrics.differences
    return {
        "samples": free.samples,
        "positions": free.positions,
        "greedy_match": free.greedy_match,
        "top1_agreement": free.top1_agreement,
        "top5_agreement": free.top5_agreement,
        "probability_change_rms": _finite(free.probability_change_rms),
        "logits_max_abs_diff": _finite(free.logits_max_abs_diff),
        "kl_mean": _finite(free.kl_mean),
        "kl_p99": _finite(percentile(free.kl, 99)) if free.kl else None,
        "kl_max": _finite(max(free.kl)) if free.kl else None,
        "kl_quantiles": _quantiles(free.kl),
        "margin_quantiles": _quantiles(free.margins),
        "flipped_margins": [round(margin, 6) for margin in sorted(free.flipped_margins)],
        "starts_at": _start(differences),
        "memory_drift": _finite(metrics.drift.largest),
        "memory": _drift(metrics.drift),
        "integer_exact": None
        if differences is None
        else differences.sums > 0 and differences.sums_differing == 0,
        "replay": _replay(metrics),
        "accuracy": metrics.scores.by_kind(),
        "changed_answers": free.changed,
        "examples": [asdict(example) for example in metrics.examples],
    }


QUANTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
"""Percent at which distributions are kept."""


def _quantiles(values: list[float]) -> list[list[float]] | None:
    """[percent, value] pairs; None for no values or some that are not finite."""
    if not values or not all(abs(value) < float("inf") for value in values):
        return None
    return [[percent, percentile(values, percent)] for percent in QUANTILES]


def _start(differences: Differences | None) -> dict[str, str | None]:
    """Where the candidate starts to differ: by a fault, and by a rounding tie; null where it does not."""
    first = None if differences is None else differences.first
    return {
        "layer": None if first is None else first.layer,
        "sentence": None if first is None else first.sentence,
        "tie": None if differences is None else differences.first_tie,
    }


def _replay(metrics: Metrics) -> dict[str, Any]:
    # The keys that reports have had from the start: "codes" are int8 activations.
    names = (
        "logits_max_abs_diff",
        "greedy_match",
        "codes",
        "codes_differing",
        "max_code_step",
        "max_tie_distance",
    )
    replayed, differences, drift = metrics.replayed, metrics.differences, metrics.replayed_drift
    if replayed is None or differences is None:
        return {**dict.fromkeys(names), "unavailable": metrics.replay_unavailable}
    return {
        "logits_max_abs_diff": _finite(replayed.logits_max_abs_diff),
        "greedy_match": replayed.greedy_match,
        "codes": differences.activations,
        "codes_differing": differences.activations_differing,
        "codes_differing_per_million": 1e6
        * differences.activations_differing
        / max(1, differences.activations),
        "max_code_step": differences.max_step,
        "max_tie_distance": differences.max_tie_distance,
        "sums": differences.sums,
        "sums_differing": differences.sums_differing,
        "rows_at_floor": differences.rows_at_floor,
        "operator_outputs": differences.operator_outputs,
        "operator_mismatches": differences.operator_mismatches,
        "scales_differing": differences.scales_differing,
        "differing_by_layer": dict(sorted(differences.differing_by_layer.items())),
        "memory_drift": None if drift is None else _finite(drift.largest),
        "memory": None if drift is None else _drift(drift),
    }


def _drift(drift: Drift) -> dict[str, Any]:
    return {
        "mean": _finite(drift.mean),
        "covariance": _finite(drift.covariance),
        # The key that reports have had from the start.
        "code": _finite(drift.latent),
        "reading": _finite(drift.reading),
        "scope": _finite(drift.scope),
        "slot": _finite(drift.slot),
        "forgotten": _finite(drift.forgotten),
        "mean_by_write": [_finite(value) for value in drift.by_write],
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _shared_processor(first: Path, second: Path) -> Processor:
    processor = Processor.from_pretrained(first)
    if (
        second != first
        and processor.tokenizer.identity != Processor.from_pretrained(second).tokenizer.identity
    ):
        raise UserError(
            f"{first.name} and {second.name} have different tokenizers: their answers cannot be compared."
        )
    return processor


def same_bundles(first: Path, second: Path) -> bool:
    """Whether two bundles hold one function, whatever their bytes."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "--against reads the weights of both models with torch; pip install 'microvlm[bench]'."
        )
    from microvlm.backends.torch_eager import load_bundle

    return first == second or same_function(load_bundle(first), load_bundle(second))


def same_function(ours: MicroVLM, theirs: MicroVLM) -> bool:
    """Whether two lowered models hold the same integers and scales in every quantised layer, and the same floats.

    Trits at two bits, in base 3 or in whole bytes are one function; eight-bit and four-bit roundings are two.
    """
    import torch

    from microvlm.model.lowering import named_packed

    layers, others = named_packed(ours), named_packed(theirs)
    if layers.keys() != others.keys():
        return False
    for name, layer in layers.items():
        other = others[name]
        if not torch.equal(_integers(layer), _integers(other)):
            return False
        if not torch.equal(layer.scale.expand(layer.rows), other.scale.expand(other.rows)):
            return False
    packed = tuple(f"{name}." for name in layers)
    left, right = (
        {key: value for key, value in model.state_dict().items() if not key.startswith(packed)}
        for model in (ours, theirs)
    )
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def _integers(layer: Any) -> Any:
    return layer.weight.float() if layer.kind == "dense" else layer.integers()
