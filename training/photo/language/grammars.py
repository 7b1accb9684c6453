"""All hand-written grammars, read: kind of question -> family of wordings -> forms."""

from __future__ import annotations

from importlib import resources

from microvlm.training.photo.language.grammar_notation import read_grammar
from microvlm.training.photo.language.nonsense import nonsense_questions

NONSENSE_FAMILIES = 10
NONSENSE_IN_FAMILY = 24
Grammar = dict[str, dict[str, list[str]]]


def _read(name: str) -> Grammar:
    """The kinds of a file `name_questions.txt`: sections `[kind]` of families, and comments."""
    text = resources.files(__package__).joinpath(f"{name}_questions.txt").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    sections = (section.partition("]") for section in lines.split("[")[1:])
    return {kind: read_grammar(families) for kind, _, families in sections}


def _read_unanswerable() -> Grammar:
    grammar = _read("unanswerable")
    for index in range(NONSENSE_FAMILIES):
        start = index * NONSENSE_IN_FAMILY
        questions = nonsense_questions(start + NONSENSE_IN_FAMILY)[start:]
        grammar["not_understood"][f"nonsense {index}"] = [f"q {text}" for text in questions]
    return grammar


GROUPS: dict[str, Grammar] = {
    "picture": {**_read("picture"), **_read("relation")},
    "kinds": _read("kind"),
    "unanswerable": _read_unanswerable(),
    "memory": _read("memory"),
}
"""Kinds whose held-out wordings may share their words."""
GRAMMARS: Grammar = {kind: grammar for group in GROUPS.values() for kind, grammar in group.items()}
