"""Naming accuracy: what a model answers when it is asked what a picture shows, against the picture's label.

An answer names the label, one of its synonyms, or a parent: a more general name of at most MOST_CLASSES of the data's
classes. It may also decline, in words that say so or by asking back; everything else is wrong. Intervals are Wilson's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from microvlm.bench.stats import wilson
from microvlm.loaded_model import LoadedModel
from microvlm.training.data.annotations import Annotations
from microvlm.training.scoring.held_out import NamedPicture, view
from microvlm.training.scoring.text_measures import Measure, mean_of, words_of

NAMING_QUESTION = "what is this?"
MOST_CLASSES = 10
"""Of the data's classes below a parent, for its name to count."""
OUTCOMES = ("label", "synonym", "parent", "wrong", "declined")
MOST_EXAMPLES = 20
"""Wrong answers that the document quotes."""
_BATCH = 16
_LEADS = (("this", "is"), ("that", "is"), ("it", "is"), ("it's",), ("that's",), ("looks", "like"))
_ARTICLES = ("a", "an", "the")
_DECLINES = (
    "i don't know", "i do not know", "don't know", "i am not sure", "i'm not sure", "not sure",
    "i don't see one", "i don't understand",
)  # fmt: skip


def name_pictures(
    loaded: LoadedModel, pictures: Sequence[NamedPicture], question: str, progress: Callable[[int], None]
) -> list[str]:
    """The model's answer to the question about each picture."""
    vision = loaded.config.vision
    answers: list[str] = []
    for start in range(0, len(pictures), _BATCH):
        part = pictures[start : start + _BATCH]
        views = [view(picture.key, picture.image, vision) for picture in part]
        answers += loaded.generate(views, prompts=question)
        progress(len(answers))
    return answers


def outcome(answer: str, annotations: Annotations) -> str:
    """Which of OUTCOMES an answer is; the first that fits."""
    if is_declined(answer):
        return "declined"
    name = bare_name(answer)
    if name == bare_name(annotations.label or ""):
        return "label"
    if name in map(bare_name, annotations.synonyms):
        return "synonym"
    parents = (parent.name for parent in annotations.parents if parent.classes <= MOST_CLASSES)
    return "parent" if name in map(bare_name, parents) else "wrong"


def is_declined(answer: str) -> bool:
    """Whether an answer says that the model does not know, asks back, or is empty."""
    plain = " ".join(words_of(answer))
    return not plain or answer.rstrip().endswith("?") or plain.startswith(_DECLINES)


def bare_name(text: str) -> tuple[str, ...]:
    """The words of a name, without "this is" and an article before it."""
    words = words_of(text)
    for lead in _LEADS:
        if tuple(words[: len(lead)]) == lead:
            words = words[len(lead) :]
            break
    return tuple(words[1:] if len(words) > 1 and words[0] in _ARTICLES else words)


def naming_document(
    pictures: Sequence[NamedPicture], answers: Sequence[str], question: str
) -> dict[str, Any]:
    """Counts and shares of each outcome, the sums of those that are right, and the first wrong answers."""
    outcomes = [outcome(answer, picture.annotations) for answer, picture in _pairs(answers, pictures)]
    counts = Counter(outcomes)
    right = counts["label"] + counts["synonym"]
    totals = {"right": right, "right_or_parent": right + counts["parent"]}
    classes = {picture.annotations.wnid or picture.annotations.label for picture in pictures}
    wrong = [pair for pair, what in zip(_pairs(answers, pictures), outcomes, strict=True) if what == "wrong"]
    return {
        "question": question,
        "pictures": len(pictures),
        "classes": len(classes),
        "with_synonyms": sum(bool(picture.annotations.synonyms) for picture in pictures),
        "rows": {
            name: _share(count, len(pictures))
            for name, count in {**{name: counts[name] for name in OUTCOMES}, **totals}.items()
        },
        "wrong_answers": [
            {"key": picture.key, "label": picture.annotations.label, "answer": answer}
            for answer, picture in wrong[:MOST_EXAMPLES]
        ],
    }


def naming_measures(pictures: Sequence[NamedPicture], answers: Sequence[str]) -> dict[str, Measure]:
    """`naming`, `naming_or_parent` and `naming_wrong`, of which differences between models are taken."""
    outcomes = [outcome(answer, picture.annotations) for answer, picture in _pairs(answers, pictures)]
    return {
        name: mean_of([what in accepted for what in outcomes])
        for name, accepted in (
            ("naming", ("label", "synonym")),
            ("naming_or_parent", ("label", "synonym", "parent")),
            ("naming_wrong", ("wrong",)),
        )
    }


def _pairs(answers: Sequence[str], pictures: Sequence[NamedPicture]) -> list[tuple[str, NamedPicture]]:
    return list(zip(answers, pictures, strict=True))


def _share(count: int, total: int) -> dict[str, float]:
    low, high = wilson(count, total)
    return {"count": count, "value": count / total, "low": low, "high": high}
