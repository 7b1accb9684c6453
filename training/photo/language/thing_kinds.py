"""What kinds of things are, as a person says it: a beagle is a dog and an animal, and no bird."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

from microvlm.training.photo.data.class_names import class_names


class _Kinds(NamedTuple):
    members: dict[str, frozenset[str]]
    """Kind -> names of things that are surely of it, the kind's own among them."""
    possible: dict[str, frozenset[str]]
    """Kind -> names of which it is open whether they are."""
    listed: frozenset[str]
    """Names whose kinds are known as far as they are listed: what is not listed for one of these is not so."""


@lru_cache(maxsize=1)
def _read() -> _Kinds:
    text = resources.files(__package__).joinpath("thing_kinds.txt").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    members: dict[str, set[str]] = {}
    above: dict[str, list[str]] = {}
    possible: dict[str, set[str]] = {}
    left_open: set[str] = set()
    # A line that begins with a blank goes on with the one before.
    for line in filter(None, re.sub(r"\n +", " ", lines).splitlines()):
        head, _, right = line.partition(":")
        names = {name.strip() for name in right.split(";") if name.strip()}
        if head == "open":
            left_open = names
        elif head.endswith("?"):
            possible[head[:-1]] = names
        else:
            parts = [part.strip() for part in head.split("<")]
            members[parts[0]], above[parts[0]] = names | {parts[0]}, parts[1:]
    # The lowest kinds name all above them, so that one pass from below is enough.
    for lower in sorted(members, key=lambda kind: -len(above[kind])):
        for higher in above[lower]:
            members[higher] |= members[lower]
    sure = {name for names in members.values() for name in names}
    return _Kinds(
        {kind: frozenset(names - left_open) for kind, names in members.items()},
        {kind: frozenset(names - members[kind]) for kind, names in possible.items()},
        frozenset(sure | set(class_names())) - left_open,
    )


@lru_cache(maxsize=1)
def thing_kinds() -> tuple[str, ...]:
    """All kinds, in the order of the file."""
    return tuple(_read().members)


@lru_cache(maxsize=8192)
def kinds_of(name: str) -> frozenset[str]:
    """The kinds that a thing surely is of; none for a name that is not listed."""
    known = _read()
    if name not in known.listed:
        return frozenset()
    return frozenset(kind for kind, names in known.members.items() if name in names)


def is_kind(name: str, kind: str) -> bool | None:
    """Whether a thing is of a kind; None where that is open. Raises KeyError for an unknown kind."""
    known = _read()
    if name in known.members[kind]:
        return True
    if name not in known.listed or name in known.possible.get(kind, frozenset()):
        return None
    return False
