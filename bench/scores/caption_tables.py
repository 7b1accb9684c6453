"""The report of `microvlm-score` about captioned pictures as tables. Scores nothing."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from microvlm.bench.records import Estimate
from microvlm.bench.scores.caption_records import (
    NAMING_ROWS,
    CaptionBaseline,
    CaptionReport,
    CaptionScores,
    ModelScores,
    NamedShare,
    NamingScores,
    ObjectScores,
    QuestionKind,
)
from microvlm.bench.tables import Report, Rows, Table

_CAPTION_ROWS = (
    ("exact match", "exact_match"),
    ("F1 of words", "word_f1"),
    ("BLEU-4", "bleu4"),
    ("CIDEr-D (of 10)", "cider_d"),
)
_OBJECT_ROWS = (
    ("object recall", "object_recall"),
    ("recall of objects that people mention", "mentioned_recall"),
    ("CHAIR_i, objects named that are not there", "chair_i"),
    ("CHAIR_s, captions with one of them", "chair_s"),
)
_NAMING_LABELS = {
    "label": "the label",
    "synonym": "a synonym",
    "right": "label or synonym",
    "parent": "a parent of at most ten classes",
    "right_or_parent": "label, synonym or parent",
    "wrong": "something wrong",
    "declined": "declined",
}
_TOKEN_ROWS = {"model": "", "shuffled": ", pictures shuffled", "unigram": "frequencies of words alone"}
_DIFFERENCES = {
    "exact_match": "captions, exact match",
    "word_f1": "captions, F1 of words",
    "bleu4": "captions, BLEU-4",
    "cider_d": "captions, CIDEr-D",
    "loss": "caption loss, nats per token",
    "token_accuracy": "top-1 accuracy of tokens",
    "questions": "questions, exact match",
    "naming": "named, label or synonym",
    "naming_or_parent": "named, label, synonym or parent",
    "naming_wrong": "named wrongly",
    **{name: title for title, name in _OBJECT_ROWS},
}


def report(document: CaptionReport) -> Report:
    models = _with_short_names([document, *([document.against] if document.against is not None else [])])
    heads = [model.model for model in models]
    data = document.data
    tables = []
    named = [(model.model, model.naming) for model in models if model.naming is not None]
    if named:
        question = named[0][1].question
        tables.append(Table("naming", f'labelled pictures, asked "{question}"', _naming(named)))
    lines: list[ModelScores | CaptionBaseline] = [*models, *document.caption_baselines]
    captioned = [(_name(line), line.captions) for line in lines if line.captions is not None]
    if captioned:
        tables.append(Table("captions", "captions against all that people wrote", _captions(captioned)))
    with_objects = [(_name(line), line.objects) for line in lines if line.objects is not None]
    if with_objects:
        title = "objects that captions name, of COCO's 80 categories"
        tables.append(Table("objects", title, _objects(with_objects)))
    if document.tokens is not None:
        title = "captions token by token, given the tokens before"
        tables.append(Table("tokens", title, _tokens(models)))
    if any(model.questions is not None and model.questions.kinds for model in models):
        tables.append(Table("questions", "questions about shown pictures, exact match", _questions(models)))
    if document.episodes:
        tables.append(
            Table("episodes", "questions about pictures that are gone from view", _episodes(models))
        )
    texts = [(model.model, model.text) for model in models if model.text is not None]
    if texts:
        rows = [[model, text.file, str(text.tokens), f"{text.perplexity:.4g}"] for model, text in texts]
        tables.append(Table("text", "plain text", [["model", "text", "tokens", "perplexity"], *rows]))
    if document.against is not None:
        title = f"{heads[0]} minus {heads[1]}, paired by picture"
        tables.append(Table("differences", title, _differences(document.against.differences)))
    for number, baseline in enumerate(document.caption_baselines, 1):
        title = f"{heads[0]} minus {baseline.name}, paired by picture"
        tables.append(Table(f"differences-baseline-{number}", title, _differences(baseline.differences)))
    remarks = [
        f"{data.samples:,} of {data.available:,} samples of {data.name} ({data.split_words}), on {document.backend}; "
        "in brackets 95 % bootstrap intervals over pictures, or over samples of questions and episodes"
        + ("; of names Wilson's" if named else "")
    ]
    return Report(f"scores of {heads[0]}", tables, [*remarks, *_remarks(document)])


def _with_short_names(models: Sequence[ModelScores]) -> list[ModelScores]:
    """The scores with the last two parts of long paths as names, unless these are the same."""
    short = ["/".join(model.model.replace("\\", "/").rstrip("/").split("/")[-2:]) for model in models]
    if len(set(short)) < len(models):
        return list(models)
    return [msgspec.structs.replace(model, model=name) for model, name in zip(models, short, strict=True)]


def _name(line: ModelScores | CaptionBaseline) -> str:
    return line.name if isinstance(line, CaptionBaseline) else line.model


def _naming(named: Sequence[tuple[str, NamingScores]]) -> Rows:
    rows = [["", *(model for model, _ in named)]]
    for name in NAMING_ROWS:
        rows.append([_NAMING_LABELS[name], *(_cell(scores.rows[name]) for _, scores in named)])
    rows.append(["pictures", *(f"{scores.pictures} of {scores.classes} classes" for _, scores in named)])
    return rows


def _objects(scored: Sequence[tuple[str, ObjectScores]]) -> Rows:
    rows = [["", *(name for name, _ in scored)]]
    for title, name in _OBJECT_ROWS:
        rows.append([title, *(_cell(getattr(scores, name)) for _, scores in scored)])
    rows.append(["pictures", *(str(scores.pictures) for _, scores in scored)])
    return rows


def _captions(captioned: Sequence[tuple[str, CaptionScores]]) -> Rows:
    rows = [["", *(model for model, _ in captioned)]]
    for title, name in _CAPTION_ROWS:
        rows.append([title, *(_cell(getattr(scores, name)) for _, scores in captioned)])
    rows.append(
        ["different captions", *(f"{scores.different} of {scores.pictures}" for _, scores in captioned)]
    )
    return rows


def _tokens(models: Sequence[ModelScores]) -> Rows:
    rows = [["", "nats per token", "perplexity", "top-1 accuracy"]]
    for model in models:
        for name, row in model.tokens.rows.items() if model.tokens is not None else ():
            label = _TOKEN_ROWS.get(name, name)
            if name != "unigram":
                label = model.model + label
            elif len(models) > 1:
                label += f", {model.model}'s tokens"
            rows.append([label, _cell(row.loss), f"{row.perplexity:.4g}", _cell(row.accuracy)])
    return rows


def _questions(models: Sequence[ModelScores]) -> Rows:
    by_model = [
        {kind.kind: kind for kind in model.questions.kinds} if model.questions else {} for model in models
    ]
    rows = [["question", "samples", *(model.model for model in models), "commonest answer"]]
    for kind, first in by_model[0].items():
        cells = [_kind_cell(kinds.get(kind)) for kinds in by_model]
        rows.append([kind, str(first.count), *cells, f"{first.commonest:.3f} ({first.commonest_answer})"])
    overall = [
        _cell(model.questions.exact_match if model.questions is not None else None) for model in models
    ]
    asked = models[0].questions.count if models[0].questions is not None else 0
    rows.append(["all", str(asked), *overall, ""])
    return rows


def _episodes(models: Sequence[ModelScores]) -> Rows:
    head = ["questions", "number"]
    head += [f"{state}, {model.model}" for model in models for state in ("with the memory", "empty memory")]
    rows = [head]
    first = models[0].episodes
    for measure, title in (("exact_match", "exact match"), ("word_f1", "F1 of words")):
        for row in first:
            cells = []
            for model in models:
                same = next((other for other in model.episodes if other.kind == row.kind), None)
                for state in ("memory", "empty"):
                    cells.append(_cell(getattr(getattr(same, state), measure) if same is not None else None))
            rows.append([f"{row.kind}, {title}", str(row.questions), *cells])
    return rows


def _differences(differences: dict[str, Estimate]) -> Rows:
    rows = [["", "difference", "95 % interval", "verdict"]]
    for name, estimate in differences.items():
        interval = f"[{estimate.low:+.3f}, {estimate.high:+.3f}]"
        rows.append([_DIFFERENCES.get(name, name), f"{estimate.value:+.3f}", interval, estimate.verdict])
    return rows


def _remarks(document: CaptionReport) -> list[str]:
    remarks = []
    if document.tokens is not None and document.tokens.picture_gain is not None:
        gain = document.tokens.picture_gain
        remarks.append(
            f"the right picture lowers the loss by {gain.value:.3f} nats per token [{gain.low:.3f}, {gain.high:.3f}]"
        )
    if document.questions is not None and document.questions.left_out:
        remarks.append(f"{document.questions.left_out} questions are longer than the model's positions")
    other = document.against
    if other is not None and other.tokens is not None and "loss" not in other.differences:
        remarks.append("the two models cut captions into different tokens: their losses do not compare")
    return remarks


def _kind_cell(kind: QuestionKind | None) -> str:
    return "" if kind is None else _cell(kind.exact_match)


def _cell(estimate: Estimate | NamedShare | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
