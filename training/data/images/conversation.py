"""The conversation schema: what a record of a data set may say about its pictures, and the turns that it becomes.

docs/data-format.md has it with examples. Columns of a table are keys of the same record.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from microvlm.configuration.answers import ABSENT, NOT_UNDERSTOOD, UNKNOWN
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.training.data.caption_data import MAX_PICTURES, MAX_TURNS, Declines, PictureNumber, Turn
from microvlm.training.data.images.source_record import (
    BAD_RECORD,
    CONTROL_CHARACTERS,
    LONG_CAPTION,
    NO_CAPTION,
    NO_PICTURE,
    NOT_UTF8,
    BadRecord,
    Skip,
)

IMAGE_KEYS = ("image", "images", "image_path", "file_name", "filename", "path", "url", "jpg", "png")
CAPTION_KEYS = ("caption", "captions", "text", "title", "label")
"""Names of columns that are tried, in this order."""
TURN_KEYS = ("question", "answer", "turns", "declines")
MAX_SAMPLE_TEXT = 60_000
"""Most characters of all turns of a sample."""


_SAYINGS = {"absent": ABSENT, "question": NOT_UNDERSTOOD}
"""What is said to a kind of thing that is to be declined, where the record does not say; else `UNKNOWN`."""


class GivenTurn(msgspec.Struct, frozen=True):
    """One turn as a user writes it."""

    answer: str | None = None
    """None: `declines` says which declining text is meant."""
    question: str | None = None
    images: Annotated[list[PictureNumber], Meta(max_length=MAX_PICTURES)] | None = None
    """None: all pictures of the record."""
    declines: Declines | None = None


class Conversation(msgspec.Struct, frozen=True):
    """What a record says beside its pictures. One of caption(s), question and answer, or turns; or `declines` alone."""

    captions: Annotated[list[str], Meta(max_length=MAX_TURNS)] = []
    question: str | None = None
    answer: str | None = None
    turns: Annotated[list[GivenTurn], Meta(max_length=MAX_TURNS)] = []
    declines: Declines | None = None
    """Of the one turn that question and answer or a caption make."""


class Columns(NamedTuple):
    """The names of a record's keys; None: guessed from `IMAGE_KEYS` and `CAPTION_KEYS`."""

    image: str | None = None
    caption: str | None = None


def find_images(row: dict[str, Any], columns: Columns) -> list[Any]:
    """The values of a row that name or hold its pictures. Raises BadRecord when there is none."""
    keys = (columns.image,) if columns.image else IMAGE_KEYS
    value = next((row[key] for key in keys if row.get(key) not in (None, "", [])), None)
    values = value if isinstance(value, list) else [value] if value is not None else []
    if not values:
        raise BadRecord(NO_PICTURE)
    if len(values) > MAX_PICTURES:
        raise BadRecord(BAD_RECORD, f"more than {MAX_PICTURES} pictures")
    return values


def find_turns(
    row: dict[str, Any], columns: Columns, pictures: int, max_text: int
) -> tuple[tuple[Turn, ...], tuple[Skip, ...]]:
    """The turns of a row with so many pictures, and what was left out of them.

    Raises BadRecord when nothing is left, and when a turn is not as the schema has it.
    """
    given = _parse(row, columns)
    if given.turns:
        turns = tuple(_turn(turn, pictures, max_text) for turn in given.turns)
        captioned = any(turn.question is None and len(turn.images) == 1 for turn in turns)
        if not captioned and not any(turn.images for turn in turns):
            raise BadRecord(
                NO_CAPTION, "questions without pictures need a picture with a caption to remember"
            )
        return _bounded(turns), ()
    if given.answer is not None or (given.declines is not None and not given.captions):
        turn = GivenTurn(given.answer, given.question, None, given.declines)
        return (_turn(turn, pictures, max_text),), ()
    each = pictures > 1 and len(given.captions) == pictures
    kept, skips = [], []
    for number, caption in enumerate(given.captions):
        try:
            turn = GivenTurn(caption, None, [number] if each else None, given.declines)
            kept.append(_turn(turn, pictures, max_text))
        except BadRecord as problem:
            skips.append(Skip(problem.reason, problem.detail))
    if not kept:
        raise BadRecord(*(skips[0] if skips else (NO_CAPTION,)))
    return _bounded(tuple(kept)), tuple(skips)


def _parse(row: dict[str, Any], columns: Columns) -> Conversation:
    """A row's own keys as a `Conversation`."""
    kept = {key: row[key] for key in TURN_KEYS if row.get(key) is not None}
    if kept.get("declines") == "":  # a cell of a table that has the column
        del kept["declines"]
    keys = (columns.caption,) if columns.caption else CAPTION_KEYS
    caption = next((row[key] for key in keys if row.get(key) not in (None, "", [])), None)
    if caption is not None:
        kept["captions"] = caption if isinstance(caption, list) else [caption]
    try:
        return documents.convert(kept, Conversation, "the record", "see docs/data-format.md")
    except UserError as error:
        raise BadRecord(BAD_RECORD, str(error)) from None


def _turn(given: GivenTurn, pictures: int, max_text: int) -> Turn:
    images = tuple(range(pictures)) if given.images is None else tuple(given.images)
    if any(number >= pictures for number in images):
        raise BadRecord(BAD_RECORD, f"a turn names picture {max(images)} of {pictures}, counted from 0")
    if not images and given.question is None:
        raise BadRecord(BAD_RECORD, "a turn without pictures needs a question")
    question = None if given.question is None else clean_text(given.question, max_text)
    answer = given.answer
    if answer is None:
        if given.declines is None:
            raise BadRecord(BAD_RECORD, "a turn needs an answer, or the kind of what it declines")
        answer = _SAYINGS.get(given.declines, UNKNOWN)
    declines = msgspec.UNSET if given.declines is None else given.declines
    return Turn(clean_text(answer, max_text), question, images, declines)


def _bounded(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    if sum(len(turn.answer) + len(turn.question or "") for turn in turns) > MAX_SAMPLE_TEXT:
        raise BadRecord(LONG_CAPTION, f"all turns together have more than {MAX_SAMPLE_TEXT} characters")
    return turns


def clean_text(text: str, max_text: int) -> str:
    """A text in Unicode's composed form, with single spaces for white space. Raises BadRecord for one of no use."""
    text = " ".join(unicodedata.normalize("NFC", text).split()) if len(text) <= 4 * max_text else text
    if not text:
        raise BadRecord(NO_CAPTION)
    if len(text) > max_text:
        raise BadRecord(LONG_CAPTION, f"more than {max_text} characters")
    kinds = {unicodedata.category(character) for character in text}
    if "Cs" in kinds or "\ufffd" in text:  # what is left of bytes that are no UTF-8
        raise BadRecord(NOT_UTF8)
    if "Cc" in kinds:
        raise BadRecord(CONTROL_CHARACTERS)
    return text


def as_label(name: str) -> str:
    """A folder's or a class's name as a caption: `golden_retriever` -> `golden retriever`."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())
