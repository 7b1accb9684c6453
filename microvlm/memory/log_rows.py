"""The log of a memory file: a JSON list with an object for each row, of stated types and ranges."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from microvlm.formats import documents
from microvlm.formats.documents import Count
from microvlm.memory.episodic import MAX_TEXT, Entry, encodable

LONGEST_LOG = 40_000_000
"""Characters of one log: more than the two texts of any row, and with all their escapes less than a header takes."""
_REMEDY = "use a copy of the file, or another one"
OPTIONAL_ARRAYS = {"log_cues": "cue", "log_picture_keys": "picture_key", "log_question_keys": "question_key"}
"""Fields of an `Entry` that may be None, by the tensors of a file that have them; zeros where one is unknown."""
_LATEST = 253_402_300_799
"""The last second of the year 9999: dates behind it cannot be printed everywhere."""
_ESCAPE = re.compile(
    r"\\(?:u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}|u(?P<lone>[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)

Text = Annotated[str, Meta(max_length=MAX_TEXT)]


class LogRow(msgspec.Struct, frozen=True):
    """One row of the log, without key and latent; the names are those of `Entry`."""

    text: Text
    time: Annotated[float, Meta(ge=0, le=_LATEST)]
    image: bool
    memory: Count = 0
    question: Text | None = None
    picture: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    value_start: Count | None = None
    told: bool = True


def encode_logs(entries: Sequence[Entry]) -> list[tuple[Sequence[Entry], str]]:
    """Runs of the entries, in order, each with its log as ASCII of at most `LONGEST_LOG`; one empty run of none.

    A byte of a file's name that is no text becomes its escape.
    """
    rows = [json.dumps(_row(entry)) for entry in entries]
    runs, begin, length = [], 0, 0
    for index, row in enumerate(rows):
        if index > begin and length + len(row) > LONGEST_LOG:
            runs.append(slice(begin, index))
            begin, length = index, 0
        length += len(row) + len(", ")
    runs.append(slice(begin, len(rows)))
    return [(entries[run], f"[{', '.join(rows[run])}]") for run in runs]


def parse_rows(log: str, origin: object) -> list[LogRow]:
    """The rows of a log. Raises UserError, which names `origin` and the key that is wrong."""
    return documents.parse(
        _without_lone_surrogates(log), list[LogRow], f"{origin} is damaged: its log", _REMEDY
    )


def entries_of(
    rows: Sequence[LogRow], keys: np.ndarray, latents: np.ndarray, parts: Mapping[str, np.ndarray]
) -> list[Entry]:
    """Rows with their keys [N, K], latents [N, C] and other arrays by the fields of an `Entry`, as views.

    Raises ValueError for other numbers of them.
    """
    known = {name: [array if array.any() else None for array in arrays] for name, arrays in parts.items()}
    return [
        Entry(
            **{name: getattr(row, name) for name in LogRow.__struct_fields__},
            key=key,
            latent=latent,
            **dict(zip(known, others, strict=True)),
        )
        for row, key, latent, *others in zip(rows, keys, latents, *known.values(), strict=True)
    ]


def known_arrays(arrays: Sequence[np.ndarray | None], width: int) -> np.ndarray:
    """Stacked arrays, float32 [N, `width`]; zeros where one is unknown."""
    unknown = np.zeros(width, np.float32)
    return np.array([unknown if array is None else array for array in arrays], np.float32).reshape(-1, width)


def parse_numbers(numbers: str, origin: object) -> list[int]:
    """A list of whole numbers from 0. Raises UserError as `parse_rows`."""
    return documents.parse(numbers, list[Count], f"{origin} is damaged: a list in it", _REMEDY)


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": encodable(entry.text),
        "time": entry.time,
        "image": entry.image,
        "memory": entry.memory,
    }
    if entry.question is not None:
        row |= {"question": encodable(entry.question), "picture": entry.picture}
    if entry.value_start is not None:
        row["value_start"] = len(encodable(entry.text[: entry.value_start]))
    return row if entry.told else {**row, "told": False}


def _without_lone_surrogates(log: str) -> str:
    r"""A JSON text in which an escape of half a character, such as \udcff, is the text that shows it.

    Older files have them, of bytes in names of pictures.
    """
    return _ESCAPE.sub(lambda match: rf"\\u{match['lone']}" if match["lone"] else match[0], log)
