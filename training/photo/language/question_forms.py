"""Questions in thousands of wordings, by kind, half of the wordings held out. Knows no pictures and no answers.

A template is a wording with placeholders: `{x}` and `{y}` are names of things, `{colour}` a colour, `{side}` a place.
Templates come from `question_forms.json`, which `build_forms` writes: families of wordings that share their main words,
each trained on or held out as a whole, inside the wrappings ("please", "can you tell me") of the same split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Literal, get_args

import numpy as np

from microvlm.training.photo.language.english import (
    agree,
    article,
    is_plural_only,
    plural,
    possessive,
    with_article,
)
from microvlm.training.photo.language.fact_subjects import fact_subjects, question_word
from microvlm.training.photo.language.wrappings import PLAIN, SIDES_AT, SIDES_OF, WRAPPINGS

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
PICTURE_KINDS = (
    "describe",
    "what",
    "what_kind",
    "what_at",
    "what_beside",
    "between",
    "where",
    "how_many",
    "how_many_of",
    "colour_of",
    "colour",
    "ground",
    "is_there",
    "is_colour",
    "is_at",
    "is_it",
)
MEMORY_KINDS = (
    "whose", "name_of", "where_from", "when", "code", "price", "giver", "kept", "used_for", "maker", "age", "size",
    "material", "due", "food_of", "contact", "how_many_have", "opinion", "lives", "instructions", "brand", "reason",
    "for_whom", "fact",
)  # fmt: skip
KINDS = (*PICTURE_KINDS, "not_understood", *MEMORY_KINDS, "fact_text")

PLAIN_SHARE = 0.6
"""How often `question` wraps a form in nothing."""
_PLACEHOLDER = re.compile(r"\{(x|y|colour|side)\}")
_OPPOSITE_NAMES = {"top": "above", "above": "top", "bottom": "below", "below": "bottom"}
_ASKS_ITSELF = re.compile(r"(do|can|could|would|have) you\b|i ")
_CONTRACTIONS = (("what is ", "what's "), ("where is ", "where's "), ("who is ", "who's "))


@dataclass(frozen=True)
class Family:
    """Wordings of one kind that share their main words."""

    name: str
    written_by: str
    """`grammar`, `smollm2`, or both joined with `+`."""
    split: Split
    forms: tuple[tuple[str, ...], ...]
    """[form][wrapping]: the templates of each form, the plainest one first."""


def placeholders(template: str) -> set[str]:
    """Names of the placeholders in a template."""
    return set(_PLACEHOLDER.findall(template))


def _spellings(clause: str, form: str) -> list[str]:
    """The form, with contractions ("what's") and in American spelling ("color")."""
    texts = [form]
    if clause == "q":
        texts += [short + form.removeprefix(long) for long, short in _CONTRACTIONS if form.startswith(long)]
    american = [re.sub(r"(?<!\{)colour", "color", text).replace("recognise", "recognize") for text in texts]
    return list(dict.fromkeys(texts + american))


def _templates(form: str, split: Split) -> tuple[str, ...]:
    """All templates of a form `clause text` of `question_forms.json`."""
    clause, _, text = form.partition(" ")
    texts = _spellings(clause, text)
    wrappings = (*PLAIN[clause], *WRAPPINGS[split][clause])
    if _ASKS_ITSELF.match(text):
        # "do you know: do you remember ..." is no English.
        wrappings = tuple(wrapping for wrapping in wrappings if not re.search(r"\b(you|tell)\b", wrapping))
    return tuple(dict.fromkeys(wrapping.replace("{}", text) for wrapping in wrappings for text in texts))


@lru_cache(maxsize=1)
def read_families() -> dict[str, tuple[Family, ...]]:
    """Kind -> its families of both splits, in the order of the file."""
    text = resources.files(__package__).joinpath("question_forms.json").read_text(encoding="utf-8")
    return {
        kind: tuple(
            Family(
                row["family"],
                row["by"],
                row["split"],
                tuple(_templates(form, row["split"]) for form in row["forms"]),
            )
            for row in rows
        )
        for kind, rows in json.loads(text)["kinds"].items()
    }


def families(kind: str, split: Split) -> tuple[Family, ...]:
    """The families of a kind in a split. Raises ValueError for an unknown kind or split."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}: {kind!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}: {split!r}")
    return tuple(family for family in read_families()[kind] if family.split == split)


@cache
def forms(kind: str, split: Split) -> tuple[str, ...]:
    """All templates of a kind in a split, each once. Raises ValueError for an unknown kind or split."""
    texts = [text for family in families(kind, split) for form in family.forms for text in form]
    return tuple(dict.fromkeys(texts))


@cache
def _usable(
    kind: str, split: Split, names: frozenset[str], word: str
) -> tuple[tuple[tuple[tuple[str, ...], ...], ...], np.ndarray]:
    """[family][form][wrapping]: templates that need no other names; of `fact_text`, those of a question word.

    Also the families' cumulative probabilities, float64 [families]: as the square roots of their numbers of forms.
    """
    usable = []
    for family in families(kind, split):
        if word and family.name.split(" ")[0] != word:
            continue
        kept = tuple(form for form in family.forms if placeholders(form[0]) <= names)
        if kept:
            usable.append(kept)
    sizes = np.cumsum(np.sqrt([len(family) for family in usable]))
    return tuple(usable), sizes / sizes[-1:]


def question(kind: str, rng: np.random.Generator, split: Split = "train", **names: str) -> str:
    """A random question of this kind with the names filled in, in lower case.

    names : `x`, `y`, `colour`, `side`, as the kind needs them; a memory's kinds use `x` where it is given. `side` is
    one of left, right, top, bottom, middle for `what_at`, of left, right, above, below for `what_beside` and `is_at`.
    The `x` of `fact_text` is one of `fact_subjects` (default: a random one of the split).
    Raises ValueError for an unknown kind, split or side, and where a name is missing.
    """
    word = ""
    if kind == "fact_text":
        if "x" not in names:
            subjects = fact_subjects(split)
            names["x"] = subjects[int(rng.integers(len(subjects)))].text
        word = question_word(names["x"])
    usable, cumulative = _usable(kind, split, frozenset(names), word)
    if not usable:
        raise ValueError(f"{kind} needs more names than {', '.join(sorted(names)) or 'none'}")
    family = usable[int(np.searchsorted(cumulative, rng.random(), side="right"))]
    templates = family[int(rng.integers(len(family)))]
    template = templates[0 if rng.random() < PLAIN_SHARE else int(rng.integers(len(templates)))]
    if "side" in names and "{side}" in template:
        template = _fill_side(template, kind, rng, split, names["side"])
    return fill(template, names)


def _fill_side(template: str, kind: str, rng: np.random.Generator, split: Split, side: str) -> str:
    phrases = SIDES_AT[split] if kind == "what_at" else SIDES_OF[split]
    key = side if side in phrases else _OPPOSITE_NAMES.get(side, "")
    if key not in phrases:
        raise ValueError(f"side must be one of {', '.join(phrases)}: {side!r}")
    # "what is above of the picture" is no English.
    choices = [phrase for phrase in phrases[key] if " " in phrase or "{side} of " not in template]
    template = re.sub(r"\bthe \{side\}", f"the {key}", template)
    return template.replace("{side}", choices[int(rng.integers(len(choices)))])


def fill(template: str, names: Mapping[str, str]) -> str:
    """The template with names in place of placeholders: articles, plurals and verbs as the names need them.

    A `{side}` is filled as it is given. Raises ValueError where a name is missing.
    """
    missing = placeholders(template) - set(names)
    if missing:
        raise ValueError(f"{template!r} needs {', '.join(sorted(missing))}")
    if "x" in names and is_plural_only(names["x"]):
        template = agree(template)

    def noun(match: re.Match[str]) -> str:
        before, name, after = match[1] or "", names[match[2]], match[3] or ""
        if after == "'s":
            name = possessive(name)
        elif after == "s":
            name = plural(name)
        if not before:
            return name
        if match[2] == "colour" or after:
            return f"{article(name)} {name}"
        return with_article(name)

    return re.sub(r"(\ban? )?\{(x|y|colour|side)\}('s|s\b)?", noun, template).lower()
