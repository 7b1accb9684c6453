"""Every document that differs from a right one in one place, and the check that each is understood or refused.

One generator for the tests of all readers of JSON: each key and item is deleted, nulled, and replaced by values of
other types, by absurd numbers and by text that a terminal would obey.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from microvlm.errors import UserError

REPLACEMENTS: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**63, 10**400, 1e308, -0.5),
    *("", "../x\x1b[31m\n|", "9" * 3000),
    *([], [None], {}, {"x": 1}),
)
"""Values of every type of JSON. What is longer or deeper is tested once a reader, not once a place."""
NO_DOCUMENTS = (
    *(b"", b"{", b"null", b"[]", b"1", b'"x"', b"\xff\xfe", b"\0"),
    *(b"[" * 100_000, b'{"x": ' * 100_000, b"1" * 100_000),
)


def mutations(document: Any, most_items: int = 3) -> Iterator[tuple[str, bytes]]:
    """(place and change, JSON with that change), in a fixed order. The first `most_items` items of a list of more than
    eight stand for the others.
    """
    for parent, key, place in list(_places(document, "", most_items)):
        for replacement in REPLACEMENTS:
            whole = parent[key]
            parent[key] = replacement
            yield f"{place} = {replacement!r:.20}", json.dumps(document).encode()
            parent[key] = whole
        whole = copy.copy(parent)
        del parent[key]
        yield f"{place} deleted", json.dumps(document).encode()
        parent.clear()
        if isinstance(whole, list):
            parent.extend(whole)
        else:
            parent.update(whole)


def check_mutations(
    document: Any, read: Callable[[bytes], object], most_items: int = 3, least_refused: float = 0.5
) -> int:
    """Give every mutation to `read`: each returns, or raises a UserError of one printable, short sentence.

    Returns the number of mutations. At least a share of `least_refused` must be refused: else `read` checks nothing.
    """
    document = copy.deepcopy(document)
    read(json.dumps(document).encode())
    results = [is_refused(read, content, place) for place, content in mutations(document, most_items)]
    assert sum(results) >= least_refused * len(results), f"{sum(results)} of {len(results)} are refused"
    for content in NO_DOCUMENTS:
        assert is_refused(read, content, repr(content[:20])), f"{content[:20]!r} is taken for a document"
    return len(results)


def is_refused(read: Callable[[bytes], object], content: bytes, place: str) -> bool:
    """Whether `read` refuses the content, by one sentence; any other exception fails the test."""
    try:
        read(content)
    except UserError as error:
        sentence = str(error)
    except Exception as error:
        raise AssertionError(f"{place}: {error!r}") from error
    else:
        return False
    assert sentence.isprintable(), (place, sentence)
    assert len(sentence) < 700, (place, sentence)
    return True


def _places(value: Any, place: str, most_items: int) -> Iterator[tuple[Any, Any, str]]:
    """(parent, key or index, its path) of every part."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value) if len(value) <= 8 else most_items))
    for key in keys:
        yield value, key, f"{place}.{key}"
        yield from _places(value[key], f"{place}.{key}", most_items)
