"""Every width of a decoder against its own float32 weights on held-out texts: KL, equal first choices, perplexity.

Each width is what an export stores, run by PyTorch with the arithmetic of the operators. Sizes are predicted, as
`microvlm info` does. Nothing is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.bench.provenance import describe_model, provenance, recorded_name
from microvlm.bench.stats import bootstrap
from microvlm.errors import UserError
from microvlm.exporters.calibration.calibrated_model import calibrate, is_fitted
from microvlm.exporters.predicted.bundle_bytes import predict_bundle
from microvlm.exporters.smaller.samples import CALIBRATE, Sample, readable
from microvlm.exporters.smaller.text_costs import divergences
from microvlm.exporters.smaller.text_rows import Reader, Row, batches
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.text_data import TextData, open_texts
from microvlm.model.checkpoint import load_checkpoint
from microvlm.model.lowering import lower
from microvlm.sizes.smaller import Smaller
from microvlm.sources.model_source import find_model

WIDTHS = ((32, 16), (16, 16), (8, 8), (4, 8), (4, 4), (1.58, 8))
"""(--bits, --embedding-bits)."""
FITTED = ((8, 8), (4, 8))
"""Those that are also fitted to texts."""
Log = Callable[[str], None]


class _Scored(NamedTuple):
    """The texts of one file as rows, and what float32 predicts of them."""

    data: TextData
    rows: list[Row]
    targets: list[Tensor]
    """Log probabilities [n, V] of each batch of rows."""


def run(
    model: str, data: Sequence[Path], calibration: Sequence[Path], count: int, progress: Log
) -> dict[str, Any]:
    """The document of `--json`. Raises UserError, also for a decoder that is ternary or packed."""
    source = find_model(model, "checkpoint")
    checkpoint = load_checkpoint(source.folder)
    if not is_fitted(checkpoint):
        raise UserError(
            f"{source.given} has no float decoder, so its widths differ in nothing but their size."
        )
    reader = Reader(checkpoint, checkpoint.to_loaded_model().processor)
    scored = [_score_whole(reader, open_texts(path), count) for path in data]
    widths = []
    for bits, table_bits in WIDTHS:
        weights = WeightFormat(bits, embedding_bits=table_bits)
        progress(f"{bits:g} bits, token table {table_bits}")
        lowered = Reader(lower(checkpoint, weights), reader.processor)
        widths.append(_width(source.folder, weights, None, lowered, scored))
    if calibration:
        names = ", ".join(path.name for path in calibration)
        samples = [
            sample
            for path in calibration
            for sample in readable(reader.processor, open_texts(path).train, CALIBRATE // len(calibration))
        ]
        for bits, table_bits in FITTED:
            fitted = calibrate(reader, samples, bits, progress)
            weights = WeightFormat(bits, embedding_bits=table_bits)
            progress(f"{bits:g} bits, token table {table_bits}, fitted to {names}")
            lowered = Reader(lower(fitted, weights), reader.processor)
            widths.append(_width(source.folder, weights, names, lowered, scored))
    return {
        "report": "precisions",
        "model": recorded_name(model),
        "data": [_describe(entry) for entry in scored],
        "widths": widths,
        "provenance": provenance(describe_model(source.folder), torch.get_num_threads()),
    }


def _score_whole(reader: Reader, data: TextData, count: int) -> _Scored:
    samples: list[Sample] = readable(reader.processor, data.validation, count)
    if not samples:
        raise UserError(f"{data.path} has no held-out text that the model reads: give a larger file.")
    rows = [reader.row(sample) for sample in samples]
    return _Scored(data, rows, [reader.logits(part, None).float().log_softmax(-1) for part in batches(rows)])


def _describe(scored: _Scored) -> dict[str, Any]:
    return {
        "name": scored.data.path.name,
        "split": "validation",
        "texts": len(scored.rows),
        "tokens": sum(len(row.scored) for row in scored.rows),
        "sha256": scored.data.sha256,
    }


def _width(
    folder: Path, weights: WeightFormat, calibrated_on: str | None, lowered: Reader, scored: Sequence[_Scored]
) -> dict[str, Any]:
    return {
        "bits": weights.bits,
        "embedding_bits": weights.embedding_bits,
        "calibrated_on": calibrated_on,
        "predicted_bundle_bytes": predict_bundle(folder, weights, Smaller()).total_bytes,
        "texts": [_cost(lowered, entry) for entry in scored],
    }


def _cost(lowered: Reader, scored: _Scored) -> dict[str, Any]:
    """Means over tokens, with 95 % bootstrap intervals over texts."""
    sums: list[list[float]] = []
    for part, target in zip(batches(scored.rows), scored.targets, strict=True):
        guess = lowered.logits(part, None).float().log_softmax(-1)
        divergence, same = divergences(target, guess)
        labels = torch.tensor([row.ids[index] for row in part for index in row.scored])
        nats = -guess.gather(1, labels[:, None])[:, 0]
        start = 0
        for row in part:
            end = start + len(row.scored)
            sums.append(
                [float(v[start:end].double().sum()) for v in (divergence, same, nats)] + [end - start]
            )
            start = end
    table = np.array(sums)
    named = {}
    for column, name in enumerate(("kl", "top1", "nats")):
        pair = table[:, [column, 3]]
        named[name] = bootstrap(lambda rows: float(rows[:, 0].sum() / rows[:, 1].sum()), pair)._asdict()
    return {**named, "perplexity": float(np.exp(min(named["nats"]["value"], 40.0)))}
