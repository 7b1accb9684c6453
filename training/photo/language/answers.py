"""The canonical texts of answers: scenes, places, counts, colours, yes and no, and the ways to decline.

All in lower case without a full stop. Knows no pictures: names, sides and numbers are given.
"""

from __future__ import annotations

from collections.abc import Sequence

from microvlm.training.photo.language.english import article, is_plural_only, plural, with_article

UNKNOWN_THING = "i don't know what this is"
NOT_SEEN = "i don't see one"
NOT_UNDERSTOOD = "i don't understand the question"
DECLINING = (UNKNOWN_THING, NOT_SEEN, NOT_UNDERSTOOD)
YES, NO = "yes", "no"
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "grey",
)
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_ORDERS = {
    "left": "from left to right",
    "right": "from right to left",
    "above": "from top to bottom",
    "below": "from bottom to top",
}


def count_word(count: int) -> str:
    """The count in words. Raises ValueError for a count outside 0..10."""
    if not 0 <= count < len(COUNTS):
        raise ValueError(f"count must be 0 to {len(COUNTS) - 1}: {count}")
    return COUNTS[count]


def place(side: str) -> str:
    """Where a thing is in the picture. Raises ValueError for an unknown side."""
    return _look_up(PLACES, "side", side)


def join(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def counted(name: str, count: int) -> str:
    """`a cat`, `two cats`."""
    return with_article(name) if count == 1 else f"{count_word(count)} {plural(name)}"


def relation(x: str, side: str, y: str) -> str:
    """`a cat is left of a dog`. Raises ValueError for an unknown side."""
    verb = "are" if is_plural_only(x) and not with_article(x).startswith("a pair") else "is"
    return f"{with_article(x)} {verb} {_look_up(RELATIONS, 'side', side)} {with_article(y)}"


def describe_scene(names: Sequence[str], side: str | None = None, ground: str | None = None) -> str:
    """A caption of one or more things.

    names : in the order of `side` where one is given, else in any order; equal names are counted. side : how each thing
    lies to the next one, one of RELATIONS. ground : the ground's colour, None for no mention.
    Raises ValueError for no names or an unknown side.
    """
    if not names:
        raise ValueError("a scene needs at least one name")
    if side is None or len(names) == 1:
        text = join([counted(name, list(names).count(name)) for name in dict.fromkeys(names)])
    elif len(names) == 2:
        text = f"{with_article(names[0])} {_look_up(RELATIONS, 'side', side)} {with_article(names[1])}"
    else:
        text = f"{join([with_article(name) for name in names])} {_look_up(_ORDERS, 'side', side)}"
    return text if ground is None else f"{text} on {article(ground)} {ground} ground"


def how_many(count: int, name: str | None = None) -> str:
    """The count as a word; "i don't see one" where a named thing is not there."""
    return NOT_SEEN if count == 0 and name is not None else count_word(count)


def absent(name: str) -> str:
    """What is said of a thing that is asked for and not there."""
    text = with_article(name)
    return f"i don't see {'any ' + name if text.startswith('some ') else text}"


def two_names(first: str, second: str) -> str:
    """The two likeliest names, for a picture that is not known."""
    return f"{with_article(first)} or {with_article(second)}"


def yes_or_no(truth: bool) -> str:
    return YES if truth else NO


def _look_up(texts: dict[str, str], what: str, key: str) -> str:
    if key not in texts:
        raise ValueError(f"{what} must be one of {', '.join(texts)}: {key!r}")
    return texts[key]
