"""Where a figure stands in a document: `results[label=ort].phases.decode.median_ms`.

Names are separated by dots. Of a list one entry is chosen, by `[KEY=VALUE]` (several with commas between them; a comma
in a value needs none, where no `=` follows it) or by its number from 0. Knows no kind of document.
"""

from __future__ import annotations

import re
from typing import Any

from microvlm.errors import UserError
from microvlm.escaping import printable

_STEP = re.compile(r"([^.\[\]]+)((?:\[[^\]]*\])*)(?:\.|$)")
_CHOICE = re.compile(r"\[([^\]]*)\]")
_NEXT_KEY = re.compile(r",\s*(?=[^,=]+=)")


class MissingMetric(Exception):
    """A document does not hold the path. The message is a clause."""


def parse_path(path: str) -> list[str | dict[str, str] | int]:
    """Names, numbers of entries, and conditions of entries, in order. Raises UserError for what is no path."""
    steps: list[str | dict[str, str] | int] = []
    at = 0
    while at < len(path):
        found = _STEP.match(path, at)
        if found is None:
            break
        steps.append(found[1])
        steps += [_choice(choice, path) for choice in _CHOICE.findall(found[2])]
        at = found.end()
    if not steps or at < len(path) or path.endswith("."):
        raise UserError(
            f"'{printable(path)}' is no metric: write names with dots, such as results[label=ort].anonymous_bytes."
        )
    return steps


def look_up(document: Any, path: str) -> Any:
    """The value at `path`. Raises MissingMetric, and UserError for what is no path."""
    value = document
    for step in parse_path(path):
        if isinstance(step, str):
            if not isinstance(value, dict) or step not in value:
                raise MissingMetric(f"there is no '{printable(step)}'")
            value = value[step]
            continue
        if not isinstance(value, list):
            raise MissingMetric("there is no list before the brackets")
        matches = [entry for number, entry in enumerate(value) if _fits(entry, number, step)]
        if len(matches) != 1:
            raise MissingMetric(f"{len(matches) or 'no'} entries fit the brackets")
        value = matches[0]
    return value


def _choice(text: str, path: str) -> dict[str, str] | int:
    if text.isdecimal() and len(text) < 10:
        return int(text)
    pairs = [pair.partition("=") for pair in _NEXT_KEY.split(text)]
    if not all(key and equals for key, equals, _ in pairs):
        raise UserError(f"'[{printable(text)}]' in '{printable(path)}' is neither a number nor KEY=VALUE.")
    return {key.strip(): value for key, _, value in pairs}


def _fits(entry: Any, number: int, step: dict[str, str] | int) -> bool:
    if isinstance(step, int):
        return number == step
    return isinstance(entry, dict) and all(str(entry.get(key)) == value for key, value in step.items())
