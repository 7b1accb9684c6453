"""Questions that name an image of a conversation by its place, such as "what was in the first image?"."""

from __future__ import annotations

import re

from microvlm.errors import UserError

ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
)


_FORM = re.compile(
    r"what (?:was|is) (?:in|on) the (?:(?P<word>[a-z]+)|(?P<number>[0-9]{1,6})(?:st|nd|rd|th)) "
    r"(?:image|picture|photo)\W*"
)


def ordinal_question(step: int) -> str:
    """The question about image `step` (from 0): a conversation writes the image under it, so that it can be asked for.

    Raises IndexError beyond the last ordinal.
    """
    return f"what was in the {ORDINALS[step]} image?"


def place_asked_for(question: str) -> int | None:
    """The place (from 0) of the image that a question asks for; None for any other question.

    Upper case, blanks, signs at the end, "picture" or "photo" and "2nd" make no difference.
    """
    match = _FORM.fullmatch(" ".join(question.lower().split()))
    if match is None:
        return None
    if match["number"]:
        return int(match["number"]) - 1 if int(match["number"]) else None
    return ORDINALS.index(match["word"]) if match["word"] in ORDINALS else None


def is_ordinal_question(question: str) -> bool:
    """Whether a question asks for an image by its place: such a question is about the memory, not the image in view."""
    return place_asked_for(question) is not None


def check_place(question: str, shown: int) -> None:
    """Raise UserError for a question about the place of an image that is not among the `shown` ones of a memory."""
    place = place_asked_for(question)
    if place is None:
        return
    if place >= len(ORDINALS):
        raise UserError(f"only the first {len(ORDINALS)} pictures are found by their place; ask otherwise.")
    if place >= shown:
        raise UserError(
            f"no picture was shown as the {ORDINALS[place]}, the memory has {shown}: ask for one of those."
        )
