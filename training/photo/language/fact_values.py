"""Open values for facts: names, words, phrases, numbers, codes, dates, times, places, prices, by seed.

Training's and the tests' values are disjoint: a value belongs to a half by the hash of its text, whatever made it.
Words are from `value_words.json` (WordNet), some given names from the facts of `nano`, all else is written or invented.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib import resources

import numpy as np

from microvlm.training.emoji.data.fact_texts import NAMES
from microvlm.training.photo.language.english import article, plural
from microvlm.training.photo.language.held_out import is_held_out

MAX_CHARACTERS = 48
"""The longest value."""
_PATTERNS: dict[str, tuple[str, ...]] = {
    "name": (
        "{given_name}",
        "{given_name}",
        "{invented}",
        "{given_name} {surname}",
        "{title} {surname}",
        "{kin} {given_name}",
        "{given_name} {invented}",
    ),
    "word": ("{noun}", "{noun}", "{adjective}", "{invented}"),
    "phrase": (
        "{adjective} {noun}",
        "{noun} and {noun}",
        "{adjective} and {adjective}",
        "a {adjective} {noun} from {city}",
        "{noun}, {noun} and {noun}",
        "a present from {given_name}",
        "{verb} the {noun}",
        "{verb} the {adjective} {noun} for {given_name}",
        "never {verb} it with a {noun}",
        "it smells of {noun}",
        "{given_name} likes {noun}s",
        "as {adjective} as a {noun}",
        "do not {verb} the {noun}",
        "the {noun} of {given_name}",
        "{given_name} and {given_name} made it",
        "it needs a {adjective} {noun}",
    ),
    "number": (
        "{digits1_5}",
        "{digits1_5}",
        "{digits1_3}.{digits1_2}",
        "{digits1_4} {unit}",
        "0{digits3_3} {digits4_6}",
        "no. {digits1_5}",
    ),
    "code": (
        "{noun}{digits1_4}",
        "{digits4_6}",
        "{mixed4_8}",
        "{letters2_2}-{digits3_4}",
        "{letters1_1}{digits1_1}-{mixed2_2}-{digits2_2}",
        "{noun}-{noun}-{digits1_4}",
        "{given_name}{digits1_4}{mark}",
    ),
    "date": (
        "{day} {month}",
        "{month} {day}",
        "{day} {month} {year}",
        "{year}-{mm}-{dd}",
        "{dd}.{mm}.{year}",
        "{weekday}, {day} {month}",
        "in {month} {year}",
        "in {season} {year}",
        "on {weekday} at {hour12}",
    ),
    "time": ("{hour}:{minute}", "at {hour}:{minute}", "{hour12}.{minute} {half}"),
    "place": (
        "in the {room} {spot}",
        "{near} the {noun}",
        "{near} the {noun} in the {room}",
        "in the {adjective} {spot}",
        "in {given_name}'s {room}",
        "in {given_name}'s {spot}",
        "at {digits1_3} {noun} street",
        "{near} the {adjective} {noun}",
    ),
    "origin": (
        "{city}",
        "a {shop} in {city}",
        "the {shop} in {noun} street",
        "from {given_name}",
        "{given_name}'s {room}",
        "the {adjective} {noun} shop",
        "{invented}",
    ),
    "price": (
        "{digits1_4} {money}",
        "{digits1_3}.{digits2_2} {money}",
        "${digits1_4}.{digits2_2}",
        "{digits1_4}.{digits2_2}",
    ),
}
"""Kind of value -> its patterns, each as likely as another. A slot is a list of
`value_words.json`, or made by `_slot`."""
VALUE_KINDS = tuple(_PATTERNS)
_RANGES = {
    "day": (1, 29),
    "year": (1950, 2030),
    "mm": (1, 13),
    "dd": (1, 29),
    "hour": (0, 24),
    "hour12": (1, 13),
    "minute": (0, 60),
}
"""Slot -> the lowest number, and the one above the highest."""
_CHARACTERS = {
    "digits": "0123456789",
    "letters": "abcdefghijklmnopqrstuvwxyz",
    # Without characters that are read as others: 0 and o, 1 and l and i.
    "mixed": "abcdefghjkmnpqrstuvwxyz23456789",
}
_SLOT = re.compile(r"(\ba )?\{(\w+)\}(s\b)?")


@lru_cache(maxsize=1)
def value_words() -> dict[str, tuple[str, ...]]:
    """Name of a slot (`noun`, `adjective`, `given_name`, `surname`, `city`, ...) -> its words."""
    text = resources.files(__package__).joinpath("value_words.json").read_text(encoding="utf-8")
    lists = {
        key: tuple(", ".join(lines).split(", ")) for key, lines in json.loads(text).items() if key != "source"
    }
    lists["given_name"] = tuple(sorted({*NAMES, *lists["given_name"]}))
    return lists


def _slot(rng: np.random.Generator, name: str) -> str:
    lists = value_words()
    if name in lists:
        return lists[name][int(rng.integers(len(lists[name])))]
    if name in _RANGES:
        number = int(rng.integers(*_RANGES[name]))
        return f"{number:02}" if name in ("mm", "dd", "minute") else str(number)
    if name == "invented":
        # Two or three syllables that mean nothing.
        return "".join(
            _slot(rng, part)
            for _ in range(int(rng.integers(2, 4)))
            for part in ("onset", "vowel", "coda")[: 2 + int(rng.integers(2))]
        )
    characters, low, high = re.fullmatch(r"([a-z]+)(\d)_(\d)", name).groups()  # type: ignore[union-attr]
    alphabet = _CHARACTERS[characters]
    length = int(rng.integers(int(low), int(high) + 1))
    return "".join(alphabet[int(index)] for index in rng.integers(len(alphabet), size=length))


def _made(kind: str, rng: np.random.Generator) -> str:
    """A random value of a kind, of either half."""
    pattern = _PATTERNS[kind][int(rng.integers(len(_PATTERNS[kind])))]

    def replacement(match: re.Match[str]) -> str:
        text = _slot(rng, match[2])
        text = plural(text) if match[3] else text
        return f"{article(text)} {text}" if match[1] else text

    return _SLOT.sub(replacement, pattern)


def value_is_held_out(text: str) -> bool:
    """Whether a value belongs to the half that training never sees."""
    return is_held_out("value", text)


def fact_value(kind: str, rng: np.random.Generator, split: str = "train") -> str:
    """A random value of a kind of VALUE_KINDS, of the split's half. Raises ValueError for an unknown kind or split."""
    if kind not in _PATTERNS:
        raise ValueError(f"kind must be one of {', '.join(VALUE_KINDS)}: {kind!r}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be one of train, held_out: {split!r}")
    while True:
        text = _made(kind, rng)
        if len(text) <= MAX_CHARACTERS and value_is_held_out(text) == (split == "held_out"):
            return text
