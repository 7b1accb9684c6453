"""`microvlm-bench attention`: attention of one model or two, tests of their codes and of the drift, as a document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microvlm.backends import load
from microvlm.backends.base import LoadedRuntime
from microvlm.bench.attention.attention_examples import read_examples
from microvlm.bench.attention.attention_maps import ModelAttention, read_model
from microvlm.bench.attention.attention_measures import (
    divergence,
    effective_rank,
    mean_length,
    prefix_measures,
)
from microvlm.bench.attention.epps_pulley import (
    LEAST_PAIRS,
    NULL_DRAWS,
    SLICES,
    SWAPS,
    holm,
    isotropy,
    one_slice_null,
    swap_test,
)
from microvlm.bench.equivalence.samples import Sample, choose, spread
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.memory.memory_bench import precision
from microvlm.bench.memory.personalisation.concept_sets import SUFFIXES
from microvlm.bench.provenance import describe_model, provenance
from microvlm.bench.speed.harness import Progress
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.sources.model_source import DEFAULT_MODEL

EVALUATION_SET = "the evaluation set"
FEATURES = {"pooled": "alignment features (mean prefix embedding)", "latents": "memory codes (latents)"}
LEAST_PICTURES = 2


@dataclass(frozen=True)
class Options:
    """Spelled as the flags of the command."""

    model: str = DEFAULT_MODEL
    against: str | None = None
    """A second model of the same shape: another checkpoint, or the same at another precision."""
    backend: str = "torch"
    pictures: Path | None = None
    """A folder; None takes the evaluation set's, and photographs for a model that sees them."""
    images: int = 60
    prompt: str | None = None
    """None takes the model's own for captions."""
    threads: int = 1
    seed: int = 0
    examples: int = 12
    """Pictures of the evaluation set whose answers and maps are kept: the first of those that `equivalence` keeps."""

    def __post_init__(self) -> None:
        if self.backend != "torch":
            raise UserError(
                f"--backend {self.backend} gives no attention weights; use --backend torch, which runs the same bundle."
            )
        least = LEAST_PICTURES if self.against is None else LEAST_PAIRS
        if self.images < least:
            raise UserError(f"--images is {self.images}; give {least} or more{self._why()}.")

    def _why(self) -> str:
        return "" if self.against is None else ": --against cannot find a drift with fewer pictures"

    def samples(self, config: MicroVLMConfig) -> list[Sample]:
        """The evaluation set's pictures, evenly spread; none where a folder was given."""
        return choose(load_evalset(), config, self.images, 0) if self.pictures is None else []

    def files(self, config: MicroVLMConfig) -> list[Path]:
        """The pictures, evenly spread over their source. Raises UserError for too few."""
        if self.pictures is None:
            return [sample.images[0] for sample in self.samples(config)]
        if not self.pictures.is_dir():
            raise UserError(f"{self.pictures} is no folder; give one with pictures.")
        found = sorted(path for path in self.pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
        least = LEAST_PICTURES if self.against is None else LEAST_PAIRS
        if len(found) < least:
            raise UserError(
                f"{self.pictures} has {len(found)} pictures ({', '.join(SUFFIXES)}); give {least} or more{self._why()}."
            )
        return spread(found, self.images)


class Measured(NamedTuple):
    """The document, and what plots are drawn of."""

    document: dict[str, Any]
    model: ModelAttention
    against: ModelAttention | None


def run(options: Options, progress: Progress = lambda _: None) -> Measured:
    """Measure. Raises UserError for a model or pictures that can't be had, and for models of different shapes."""
    runtime = load(options.backend, options.model, options.threads)
    processor = Processor.from_pretrained(runtime.directory)
    other = None if options.against is None else load(options.backend, options.against, options.threads)
    prompt = options.prompt or runtime.config.prompt.caption_prompt
    files = options.files(runtime.config)
    progress(f"{runtime.directory.name}: {len(files)} pictures")
    model = read_model(runtime, processor, files, prompt)
    # A page may show the package's own pictures, and no user's.
    examples = read_examples(runtime, processor, options.samples(runtime.config)[: options.examples], prompt)
    progress(f"{runtime.directory.name}: {NULL_DRAWS} draws of the null")
    document: dict[str, Any] = {
        "report": "attention",
        "backend": options.backend,
        "prompt": prompt,
        "pictures": len(files),
        "source": EVALUATION_SET if options.pictures is None else options.pictures.name,
        "prefix_tokens": model.shape[2],
        "text_tokens": len(model.tokens.labels),
        "slices": SLICES,
        "draws": NULL_DRAWS,
        "model": _side(runtime, model, options.seed),
        "null": one_slice_null()._asdict(),
        "stretch": runtime.config.vision.resize == "stretch",
        "examples": examples,
        "provenance": provenance(describe_model(runtime.directory), options.threads),
    }
    if other is None:
        return Measured(document, model, None)
    progress(f"{other.directory.name}: the same pictures")
    against = read_model(other, Processor.from_pretrained(other.directory), files, prompt)
    _require_same_shape(runtime, model, other, against)
    progress(f"{SWAPS} swaps")
    document["comparison"] = {
        "against": _side(other, against, options.seed),
        "swaps": SWAPS,
        **drift(model, against, options.seed),
    }
    document["provenance"]["against"] = describe_model(other.directory)
    return Measured(document, model, against)


def drift(first: ModelAttention, second: ModelAttention, seed: int = 0) -> dict[str, Any]:
    """`test` over all layers, and `layers`: each layer's test, divergence and largest difference."""
    pairs = [
        (a.reshape(len(a), -1), b.reshape(len(b), -1))
        for a, b in zip(first.prefix, second.prefix, strict=True)
    ]
    test, tests = swap_test(pairs, seed=seed)
    adjusted = holm([part.p_value for part in tests])
    layers = [
        {
            "test": part._asdict(),
            "p_holm": p_holm,
            "divergence": float(divergence(a, b).mean()),
            "largest": float(np.abs(a - b).max()),
        }
        for part, p_holm, a, b in zip(tests, adjusted, first.prefix, second.prefix, strict=True)
    ]
    return {"test": test._asdict(), "layers": layers}


def _side(runtime: LoadedRuntime, model: ModelAttention, seed: int) -> dict[str, Any]:
    widths = precision(runtime)
    return {
        "model": runtime.directory.name,
        "decoder_bits": widths["decoder_bits"],
        "embedding_bits": widths["embedding_bits"],
        "layers": [_layer(layer, slot) for layer, slot in zip(model.prefix, model.slot, strict=True)],
        "isotropy": [_isotropy(name, getattr(model, name), seed) for name in FEATURES],
    }


def _layer(prefix: np.ndarray, slot: np.ndarray) -> dict[str, Any]:
    measures = prefix_measures(prefix)
    even = np.log(prefix.shape[-1])
    heads = []
    for head, slot_share in enumerate(slot):
        mean, largest, entropy, sparsity = (float(part[:, head].mean()) for part in measures)
        heads.append(
            {
                "mean": mean,
                "max": largest,
                "entropy": entropy,
                "relative_entropy": entropy / even if even else 1.0,
                "sparsity": sparsity,
                "text": 1 - mean,
                "slot": float(slot_share),
            }
        )
    # Each picture beside the next one: how far attention moves when only the picture changes.
    between = float(divergence(prefix, np.roll(prefix, 1, 0)).mean())
    return {"heads": heads, "picture_divergence": between}


def _isotropy(name: str, features: np.ndarray, seed: int) -> dict[str, Any]:
    return {
        "features": FEATURES[name],
        "samples": len(features),
        "width": features.shape[1],
        **isotropy(features, seed=seed)._asdict(),
        "mean_length": mean_length(features),
        "effective_rank": effective_rank(features),
    }


def _require_same_shape(
    first: LoadedRuntime, model: ModelAttention, second: LoadedRuntime, against: ModelAttention
) -> None:
    names = f"{first.directory.name} and {second.directory.name}"
    if model.shape != against.shape:
        ours, theirs = (" x ".join(map(str, part.shape)) for part in (model, against))
        raise UserError(
            f"{names} have attention of different shapes, {ours} and {theirs} (layers x heads x prefix embeddings): "
            "give --against a checkpoint or a bundle of the same architecture."
        )
    if model.tokens.ids != against.tokens.ids:
        raise UserError(
            f"{names} read the prompt as different tokens, so their attention cannot be compared: give two models "
            "with the same tokenizer."
        )
