"""The scores `answers`: what a model declines, how often it is right when it is sure, and the fit of its confidence."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.atomic import write_file
from microvlm.bench.provenance import describe_model, provenance, recorded_name
from microvlm.bench.stats import wilson
from microvlm.config import CONFIG, AnswersConfig, MicroVLMConfig
from microvlm.errors import UserError
from microvlm.sources.model_source import find_model
from microvlm.training.data.caption_data import SPLITS, CaptionData, fingerprint, open_data
from microvlm.training.honesty.calibration import fit_answers
from microvlm.training.honesty.items import Said, answer_items, read_items
from microvlm.training.honesty.measures import auroc, calibration_part, risk_coverage
from microvlm.training.scoring.caption_scores import load_model
from microvlm.training.scoring.held_out import EVERY_SPLIT
from microvlm.training.scoring.registry import Log, ScoreRequest
from microvlm.training.watching.progress import Progress

LEAST_RIGHT = 50
"""Right answers without which no calibration is fitted: a threshold on a twentieth of fewer is one answer's chance."""
_LINES = 4
_OTHER_SCORES = ("against", "text", "pictures", "decoder", "words")


def score(request: ScoreRequest, log: Log) -> dict[str, Any]:
    """The document of kind `answers`; with `fit_answers` a calibration is fitted and saved first. Raises UserError."""
    for name in _OTHER_SCORES:
        if getattr(request, name) is not None:
            raise UserError(f"--{name} is not an option of the scores 'answers': leave it out.")
    folder = _checkpoint_to_fit(request) if request.fit_answers else None
    find_model(request.model)
    data = open_data(request.data)
    split = request.split or ("validation" if request.fit_answers else "test")
    items = read_items(data, split, request.count)
    loaded = load_model(request.model, request.backend, request.device)
    log(f"scoring {request.model} on {request.backend}")
    with Progress(len(items), every=-(-len(items) // _LINES), name="answers") as progress:
        done = 0

        def update(now: int) -> None:
            nonlocal done
            progress.update(now, samples=now - done)
            done = now

        said = answer_items(loaded, items, update)
    config = loaded.config.answers
    if folder is not None:
        config = fit(said, config)
        save(folder, config)
        said = [judged(answer, config) for answer in said]
        log(f"{folder / CONFIG}: {len(config.points)} points, threshold {config.threshold:.3f}")
    return {
        "report": "answers",
        "backend": request.backend,
        "model": recorded_name(request.model),
        "data": _describe(data, split, items_of=said),
        "provenance": provenance(describe_model(loaded.runtime.directory), None),
        **measure(said, config, fitted=request.fit_answers),
    }


def fit(said: Sequence[Said], old: AnswersConfig | None) -> AnswersConfig:
    """The calibration of a model's answers that name something. Raises UserError for too few right ones."""
    named = [answer for answer in said if answer.names]
    right = np.array([answer.right for answer in named], bool)
    if right.sum() < LEAST_RIGHT:
        raise UserError(
            f"{int(right.sum())} of {len(said)} answers are right, and a calibration needs {LEAST_RIGHT} or more: give "
            "more samples (--count, another --data) whose answers are what the model is to say."
        )
    return fit_answers(np.array([answer.log_probability for answer in named]), right, old)


def judged(answer: Said, config: AnswersConfig) -> Said:
    """The same answer under another calibration."""
    if not answer.names:
        return answer
    confidence = config.confidence(answer.log_probability)
    declined = confidence is not None and confidence < config.threshold
    return answer._replace(confidence=confidence, declined=declined)


def save(folder: Path, config: AnswersConfig) -> None:
    """Replace the calibration in a checkpoint's config.json, at once. Raises UserError."""
    whole = dataclasses.replace(MicroVLMConfig.load(folder), answers=config)
    write_file(folder / CONFIG, json.dumps(whole.to_dict(), indent=2) + "\n")


def measure(said: Sequence[Said], config: AnswersConfig | None, fitted: bool = False) -> dict[str, Any]:
    """The measured part of the document. A model without a calibration is ranked by its log probabilities."""
    known = [answer for answer in said if not answer.item.declines]
    strangers = [answer for answer in said if answer.item.declines]
    sureness = np.array([answer.log_probability for answer in known])
    right = np.array([answer.right for answer in known], bool)
    sure = [answer for answer in said if answer.confidence is not None]
    document: dict[str, Any] = {
        "fitted": fitted,
        "threshold": None if config is None or not config.is_calibrated else config.threshold,
        "points": [] if config is None else list(config.points),
        "values": [] if config is None else list(config.values),
        "known": [_known_row("all", known)] if known else [],
        "strangers": [],
    }
    for kind, group in _by_kind(known):
        document["known"].append(_known_row(kind, group))
    for kind, group in _by_kind(strangers):
        own = sum(not answer.names for answer in group)
        theirs = np.array([answer.log_probability for answer in group])
        document["strangers"].append(
            {
                "kind": kind,
                "count": len(group),
                "declined": _share(sum(answer.declined for answer in group), len(group)),
                "own_words": own / len(group),
                "auroc": auroc(sureness[right], theirs),
            }
        )
    if sure:
        confidences = np.array([answer.confidence for answer in sure], np.float64)
        document["calibration"] = calibration_part(confidences, np.array([answer.right for answer in sure]))
    if known:
        document["risk_coverage"] = risk_coverage(sureness, right)
        document["auroc"] = auroc(sureness[right], sureness[~right])
    return document


def _known_row(kind: str, group: Sequence[Said]) -> dict[str, Any]:
    """Outcomes of things that can be answered: right, wrong and declined are shares of all."""
    right = [answer for answer in group if answer.right]
    said = [answer for answer in group if not answer.declined]
    return {
        "kind": kind,
        "count": len(group),
        "right": _share(sum(answer.right for answer in said), len(group)),
        "wrong": _share(sum(not answer.right for answer in said), len(group)),
        "declined": _share(len(group) - len(said), len(group)),
        "right_declined": _share(sum(answer.declined for answer in right), len(right)) if right else None,
    }


def _by_kind(said: Iterable[Said]) -> list[tuple[str, list[Said]]]:
    groups: dict[str, list[Said]] = defaultdict(list)
    for answer in said:
        groups[answer.item.kind].append(answer)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def _share(count: int, total: int) -> dict[str, float]:
    low, high = wilson(count, total)
    return {"value": count / total, "low": low, "high": high}


def _describe(data: CaptionData, split: str, items_of: Sequence[Said]) -> dict[str, Any]:
    return {
        "name": data.name,
        "split": split,
        "samples": len({answer.item.key for answer in items_of}),
        "available": sum(map(data.count, SPLITS if split == EVERY_SPLIT else (split,))),
        "sha256": fingerprint(data),
    }


def _checkpoint_to_fit(request: ScoreRequest) -> Path:
    """The folder whose config.json is to change. Raises UserError for anything that is not the user's checkpoint."""
    if request.split in ("test", EVERY_SPLIT):
        raise UserError(
            "--fit-answers never uses the test split, which measures the result: give another --split."
        )
    if (
        not os.path.isdir(request.model)
        or find_model(request.model).folder.resolve() != Path(request.model).resolve()
    ):
        raise UserError(
            f"--fit-answers writes into a checkpoint's folder, and '{request.model}' is not one: copy the checkpoint "
            "into a folder of its own and give that."
        )
    return find_model(request.model, "checkpoint").folder
