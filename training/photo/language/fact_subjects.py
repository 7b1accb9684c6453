"""Subjects of questions that need no picture ("the wifi code"): what asks for them, and what kind of value answers.

Half of the subjects are held out, decided by a hash of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from microvlm.training.photo.language.grammar_notation import expand
from microvlm.training.photo.language.held_out import is_held_out


@dataclass(frozen=True)
class Subject:
    """What a question without a picture asks for."""

    text: str
    word: str
    """What asks for it: what, where, when or who."""
    value: str
    """The kind of its value, one of `fact_values.VALUE_KINDS`."""


@lru_cache(maxsize=1)
def all_subjects() -> tuple[Subject, ...]:
    """All subjects, each text once."""
    subjects: dict[str, Subject] = {}
    text = resources.files(__package__).joinpath("fact_subjects.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        kinds, _, texts = line.partition(":")
        word, value = kinds.split()
        for notation in texts.split(";"):
            for text in expand(notation.strip()):
                subjects.setdefault(text, Subject(text, word, value))
    return tuple(subjects.values())


@lru_cache(maxsize=2)
def fact_subjects(split: str) -> tuple[Subject, ...]:
    """The subjects of a split, `train` or `held_out`."""
    return tuple(s for s in all_subjects() if is_held_out("subject", s.text) == (split == "held_out"))


@lru_cache(maxsize=1)
def _words() -> dict[str, str]:
    return {subject.text: subject.word for subject in all_subjects()}


def question_word(text: str) -> str:
    """What asks for a subject; "what" for one that is not of the list."""
    return _words().get(text, "what")
