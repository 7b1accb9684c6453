"""The scores of captioned pictures, whoever took them: captions, their tokens, questions, episodes and plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microvlm import backends
from microvlm.bench.provenance import describe_model, provenance, recorded_name
from microvlm.errors import UserError
from microvlm.loaded_model import LoadedModel, load_processor
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.sources.model_source import find_model
from microvlm.training.batches.text_windows import text_windows
from microvlm.training.data.caption_data import CaptionData, fingerprint, open_data
from microvlm.training.scoring import answer_scores as answering
from microvlm.training.scoring import naming_scores as naming
from microvlm.training.scoring.contact_sheet import chosen_pictures, sheet_path, write_sheet
from microvlm.training.scoring.held_out import (
    Episode,
    HeldOut,
    NamedPicture,
    Picture,
    Question,
    read_held_out,
)
from microvlm.training.scoring.object_scores import annotated, object_measures
from microvlm.training.scoring.registry import Log, ScoreRequest
from microvlm.training.scoring.text_measures import Measure, answer_measures, ratio
from microvlm.training.scoring.token_scores import count_tokens, score_tokens, tokenize
from microvlm.training.stages.caption_evaluation import text_perplexity
from microvlm.training.watching.progress import Progress

MOST_NATS = 40.0
"""Of a loss whose perplexity is written out: more is a broken model."""
_LINES = 4
"""Lines of progress where there is no terminal."""


@dataclass
class Scored:
    """One model's part of the document, and what is compared with another model's."""

    document: dict[str, Any]
    measures: dict[str, Measure]
    """What another model's scores of the same items are subtracted from."""
    items: dict[str, Any]
    """What a measure was taken on; only measures of the same are compared."""
    captions: list[str]


def score(request: ScoreRequest, log: Log) -> dict[str, Any]:
    """The document of kind `captions`. Raises UserError."""
    sheet = None if request.pictures is None else sheet_path(request.pictures)
    if request.text is not None and request.backend != "torch":
        raise UserError("--text needs --backend torch, which runs checkpoints and bundles.")
    for model in (request.model, *([request.against] if request.against is not None else [])):
        find_model(model)  # a wrong name is said now, and not after all captions of the first
    data = open_data(request.data)
    split = request.split or "test"
    held_out = read_held_out(data, split, request.count)
    if sheet is not None and not held_out.pictures:
        raise UserError(
            f"{request.data} has no captioned pictures in its {split} split: leave out --pictures."
        )
    described = {
        "name": data.name,
        "split": split,
        "samples": held_out.samples,
        "available": held_out.available,
        "sha256": fingerprint(data),
    }
    import sacrebleu  # noqa: F401 (a missing package is told before minutes of captions)

    scored = _score_model(request.model, request, data, held_out, log)
    document = {"report": "captions", "backend": request.backend, "data": described, **scored.document}
    other = None
    if request.against is not None:
        other = _score_model(request.against, request, data, held_out, log)
        document["against"] = {**other.document, "differences": differences(scored, other)}
    if request.template or request.decoder is not None:
        from microvlm.training.scoring.caption_baselines import score_baselines

        if scored.captions:
            document["caption_baselines"] = score_baselines(request, held_out.pictures, scored, log)
    chosen = chosen_pictures(held_out.pictures) if scored.captions else []
    document["examples"] = [
        {
            "key": held_out.pictures[number].key,
            "model": scored.captions[number],
            "captions": list(held_out.pictures[number].captions),
            **({} if other is None else {"against": other.captions[number]}),
        }
        for number in chosen
    ]
    if sheet is not None:
        models = {"model": scored.captions, **({} if other is None else {"against": other.captions})}
        _write_sheet([(held_out.pictures[number], number) for number in chosen], models, sheet)
        log(f"{len(chosen)} pictures in {sheet}")
    return document


def _write_sheet(chosen: list[tuple[Picture, int]], models: dict[str, list[str]], path: Path) -> None:
    said = [
        [*((who, captions[number]) for who, captions in models.items()), ("human", picture.captions[0])]
        for picture, number in chosen
    ]
    write_sheet([picture for picture, _ in chosen], said, path)


def load_model(source: str, backend: str, device: str | None) -> LoadedModel:
    """A model to score. Raises UserError, also for one without tokenizer and for a device that is not here."""
    options: dict[str, Any] = {} if device is None else {"device": device}
    try:
        runtime = backends.load(backend, source, **options)
    except torch.OutOfMemoryError:
        raise UserError(f"{source} does not fit the memory of {device}: leave out --device.") from None
    except (RuntimeError, AssertionError):  # torch raises either for a missing device
        if device is None:
            raise
        raise UserError(f"device '{device}' is not available here: leave out --device.") from None
    return LoadedModel(runtime, load_processor(runtime))


def _score_model(
    source: str, request: ScoreRequest, data: CaptionData, held_out: HeldOut, log: Log
) -> Scored:
    loaded = load_model(source, request.backend, request.device)
    log(f"scoring {source} on {request.backend}")
    # Read first, as above.
    windows = None if request.text is None else text_windows(request.text, loaded.processor)
    facts = provenance(describe_model(loaded.runtime.directory), None)
    scored = Scored({"model": recorded_name(source), "provenance": facts}, {}, {}, [])
    if held_out.named and request.wants("naming"):
        _score_names(loaded, held_out.named, request.question, scored)
    if held_out.pictures and request.wants("captions"):
        _score_captions(loaded, held_out.pictures, scored)
    if held_out.pictures and request.wants("tokens"):
        _score_tokens(loaded, held_out.pictures, data if request.baselines else None, scored)
    if held_out.questions and request.wants("questions"):
        _score_questions(loaded, held_out.questions, scored)
    if request.wants("episodes"):
        _score_episodes(loaded, held_out, scored)
    if windows is not None:
        scored.document["text"] = _score_text(loaded, request.text, windows)
    return scored


def _score_names(loaded: LoadedModel, pictures: list[NamedPicture], question: str, scored: Scored) -> None:
    with _progress("names", len(pictures)) as progress:
        answers = naming.name_pictures(loaded, pictures, question, progress)
    measures = naming.naming_measures(pictures, answers)
    scored.measures |= measures
    scored.items |= dict.fromkeys(measures, len(pictures))
    scored.document["naming"] = naming.naming_document(pictures, answers, question)


def _score_captions(loaded: LoadedModel, pictures: list[Picture], scored: Scored) -> None:
    with _progress("captions", len(pictures)) as progress:
        answers = answering.caption_pictures(loaded, pictures, progress)
    enter_captions(answers, pictures, scored)


def enter_captions(answers: list[str], pictures: list[Picture], scored: Scored) -> None:
    """Score captions, whoever wrote them, against people's and against the objects that are there."""
    references = [picture.captions for picture in pictures]
    measures = answer_measures(answers, references)
    scored.captions = answers
    scored.measures |= measures
    scored.items |= dict.fromkeys(measures, len(pictures))
    numbers = annotated(pictures)
    if numbers:
        of_objects = object_measures(
            [answers[number] for number in numbers], [pictures[number] for number in numbers]
        )
        scored.measures |= of_objects
        scored.items |= dict.fromkeys(of_objects, len(numbers))
        scored.document["objects"] = {
            "pictures": len(numbers),
            **{name: answering.as_estimate(measure) for name, measure in of_objects.items()},
        }
    scored.document["captions"] = {
        "pictures": len(pictures),
        "references": sum(map(len, references)),
        "different": len(set(answers)),
        **{name: answering.as_estimate(measure) for name, measure in measures.items()},
    }


def _score_tokens(
    loaded: LoadedModel, pictures: list[Picture], data: CaptionData | None, scored: Scored
) -> None:
    """Scores of the captions' tokens, with the baselines where `data` is given."""
    captions = tokenize(loaded, pictures)
    with _progress("caption loss", len(pictures)) as progress:
        scores = score_tokens(loaded, pictures, captions, data is not None, progress)
    rows = {"model": scores.model}
    if scores.shuffled is not None:
        rows["shuffled"] = scores.shuffled
    if data is not None:
        rows["unigram"] = count_tokens(loaded, data).scores(captions)
    losses = {name: Measure(part[:, :2], ratio) for name, part in rows.items()}
    accuracies = {name: Measure(part[:, [2, 1]], ratio) for name, part in rows.items()}
    described = {}
    for name in rows:
        loss = answering.as_estimate(losses[name])
        accuracy = answering.as_estimate(accuracies[name])
        perplexity = math.exp(min(loss["value"], MOST_NATS))
        described[name] = {"loss": loss, "perplexity": perplexity, "accuracy": accuracy}
    scored.document["tokens"] = {"count": int(scores.model[:, 1].sum()), "rows": described}
    if "shuffled" in losses:
        scored.document["tokens"]["picture_gain"] = losses["shuffled"].minus(losses["model"])._asdict()
    scored.measures |= {"loss": losses["model"], "token_accuracy": accuracies["model"]}
    # Losses of models that cut a caption into other tokens are no losses of the same.
    tails = [caption.tail.tolist() for group in captions for caption in group]
    scored.items |= {"loss": tails, "token_accuracy": tails}


def _score_questions(loaded: LoadedModel, questions: list[Question], scored: Scored) -> None:
    fitting = answering.fitting(loaded, questions)
    part: dict[str, Any] = {"count": len(fitting), "left_out": len(questions) - len(fitting)}
    if fitting:
        with _progress("questions", len(fitting)) as progress:
            answers = answering.answer_questions(loaded, fitting, progress)
        measure = answering.exact_matches(fitting, answers)
        scored.measures["questions"] = measure
        scored.items["questions"] = fitting
        part["exact_match"] = answering.as_estimate(measure)
        part["kinds"] = answering.question_kinds(fitting, answers)
    scored.document["questions"] = part


def _score_episodes(loaded: LoadedModel, held_out: HeldOut, scored: Scored) -> None:
    rows = []
    kinds: list[tuple[str, list[Episode]]] = [
        ("asked in the data", held_out.episodes),
        ("by place", answering.own_episodes(held_out.pictures)),
    ]
    for name, episodes in kinds:
        if not episodes:
            continue
        count = min(len(episodes), answering.MOST_EPISODES)
        with _progress(f"episodes, {name}", count) as progress:
            questions, remembered, empty = answering.answer_episodes(loaded, episodes, progress)
        if questions:
            row: dict[str, Any] = {"kind": name, "episodes": count, "questions": len(questions)}
            for label, answers in (("memory", remembered), ("empty", empty)):
                exact = answering.exact_matches(questions, answers)
                row[label] = {
                    "exact_match": answering.as_estimate(exact),
                    "word_f1": answering.as_estimate(answering.shared_words(questions, answers)),
                }
            rows.append(row)
    scored.document["episodes"] = rows


def _score_text(loaded: LoadedModel, file: Path | None, windows: Tensor) -> dict[str, Any]:
    assert file is not None
    assert isinstance(loaded.runtime, TorchRuntime)
    with torch.inference_mode():
        perplexity = text_perplexity(loaded.runtime.model, windows)
    return {"file": file.name, "tokens": windows.numel(), "perplexity": perplexity}


def differences(scored: Scored, other: Scored) -> dict[str, dict[str, float]]:
    """The first's scores minus the second's, of what both were scored on."""
    return {
        name: measure.minus(other.measures[name])._asdict()
        for name, measure in scored.measures.items()
        if scored.items[name] == other.items.get(name)
    }


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    with Progress(total, every=-(-total // _LINES), name=name) as progress:
        done = 0

        def update(now: int) -> None:
            nonlocal done
            progress.update(now, samples=now - done)
            done = now

        yield update
