"""Scores of decoders on held-out texts: how far each is from a teacher, beside what rounding and counting give.

For each position KL(teacher || model), whether both have the same most probable token, and the model's cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microvlm.bench.provenance import describe_model, provenance, recorded_name
from microvlm.errors import UserError
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.text_data import TextData, open_texts
from microvlm.loaded_model import LoadedModel
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.conversation_rows import Rows
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.batches.token_rows import TokenRows, cut_alike, row_logits
from microvlm.training.scoring.caption_scores import load_model
from microvlm.training.scoring.registry import Log, ScoreRequest
from microvlm.training.scoring.text_measures import Measure, ratio

COUNT, BATCH = 256, 4
"""Texts that are scored by default, and rows of a batch: logits of a thousand tokens are 200 MB a model."""
COUNTED = 20_000
"""Most training texts whose tokens are counted for the unigram."""
Logits = Callable[[Rows], Tensor]
"""Rows -> logits, or log probabilities, [n, V] at the labelled positions."""


def score(request: ScoreRequest, log: Log) -> dict[str, Any]:
    """The document of kind `texts`: MODEL, those beside it, rounding, unigram and uniform against the teacher.

    Raises UserError.
    """
    if request.against is None:
        raise UserError("--against is missing: name the teacher, the float model that MODEL was made from.")
    if request.backend != "torch":
        raise UserError("texts are scored with --backend torch, which runs checkpoints and bundles.")
    data = open_texts(request.data)
    split = request.split or "validation"
    if split not in ("train", "validation"):
        raise UserError(f"{request.data} has the splits train and validation: give --split one of them.")
    teacher = load_model(request.against, "torch", request.device)
    student = load_model(request.model, "torch", request.device)
    rows_of = TokenRows(teacher.processor)
    beside = {name: load_model(name, "torch", request.device) for name in request.beside}
    for name, loaded in {request.model: student, **beside}.items():
        _check_tokens(name, loaded, teacher, request.against)
    texts = spread(data.texts(split), request.count or COUNT)
    teacher_model = _model(teacher)
    log(f"rounding {request.against} to 1.58 bits")
    rounded = lower(teacher_model, WeightFormat(1.58))
    unigram = _unigram(data, rows_of, teacher_model.config.text.vocab_size)
    candidates: dict[str, Logits] = {
        "model": _of(_model(student)),
        **{recorded_name(name): _of(_model(loaded)) for name, loaded in beside.items()},
        "rounding": _of(rounded),
        "unigram": lambda rows: unigram.expand(int((rows.labels != IGNORED).sum()), -1),
        "uniform": lambda rows: torch.zeros_like(unigram).expand(int((rows.labels != IGNORED).sum()), -1),
        "teacher": _of(teacher_model),
    }
    sums: dict[str, list[list[float]]] = {name: [] for name in candidates}
    device = teacher_model.memory_prior.device
    for start in range(0, len(texts), BATCH):
        rows = rows_of.build(texts[start : start + BATCH]).to(device)
        for name, scores in row_sums(rows, candidates).items():
            sums[name] += scores
        log(f"{min(start + BATCH, len(texts))} of {len(texts)} texts")
    return {
        "report": "texts",
        "model": recorded_name(request.model),
        "teacher": recorded_name(request.against),
        "data": {
            "name": data.path.name,
            "split": split,
            "texts": len(texts),
            "tokens": int(sum(row[3] for row in sums["teacher"])),
            "sha256": data.sha256,
        },
        "rows": [{"name": name, **estimates(values)} for name, values in sums.items()],
        "provenance": provenance(describe_model(student.runtime.directory), None),
    }


def row_sums(rows: Rows, candidates: dict[str, Logits]) -> dict[str, list[list[float]]]:
    """Name -> for each row the sums of KL, of equal tokens, of nats, and the number of tokens."""
    labelled = rows.labels != IGNORED
    owner = labelled.nonzero()[:, 0]
    labels = rows.labels[labelled]
    with torch.no_grad():
        target = candidates["teacher"](rows).float().log_softmax(-1)
        result = {}
        for name, logits in candidates.items():
            guess = logits(rows).float().log_softmax(-1)
            kl = (target.exp() * (target - guess)).sum(-1)
            same = (guess.argmax(-1) == target.argmax(-1)).float()
            nats = -guess.gather(1, labels[:, None])[:, 0]
            parts = torch.stack([kl, same, nats, torch.ones_like(kl)], 1).double()
            sums = parts.new_zeros(len(rows.ids), 4).index_add(0, owner, parts)
            result[name] = sums[sums[:, 3] > 0].tolist()
    return result


def estimates(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Sums [texts, 4] of `row_sums` -> means over tokens with 95 % bootstrap intervals over texts; the perplexity."""
    sums = np.array(rows, np.float64)
    named = {}
    for column, name in enumerate(("kl", "top1", "nats")):
        named[name] = Measure(sums[:, [column, 3]], ratio).interval()._asdict()
    return {**named, "perplexity": float(np.exp(min(named["nats"]["value"], 40.0)))}


def _unigram(data: TextData, rows_of: TokenRows, size: int) -> Tensor:
    """Log probabilities [V] of tokens by their number in the training texts, each counted once more."""
    counts = torch.ones(size, dtype=torch.float64)
    for text in spread(data.train, COUNTED):
        tokens = torch.tensor(rows_of.tokens(text))
        counts.index_add_(0, tokens, torch.ones(len(tokens), dtype=torch.float64))
    return (counts / counts.sum()).log().float()


def _of(model: MicroVLM) -> Logits:
    return lambda rows: row_logits(model, rows)


def _model(loaded: LoadedModel) -> MicroVLM:
    model: MicroVLM = loaded.runtime.model  # type: ignore[attr-defined]
    return model


def _check_tokens(name: str, student: LoadedModel, teacher: LoadedModel, against: str) -> None:
    """Raise UserError for two models that cut texts into other tokens."""
    same = cut_alike(student.processor.tokenizer, teacher.processor.tokenizer)
    if not same or student.config.text.vocab_size != teacher.config.text.vocab_size:
        raise UserError(f"{name} and {against} have other tokens: name the model it was made from.")


def spread(texts: tuple[str, ...], count: int) -> list[str]:
    """`count` texts, evenly spread, or all."""
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).round().astype(int))
    return [texts[index] for index in chosen]
