"""Other names of a data folder's classes, from WordNet: synonyms, and parents with the classes that are below them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from microvlm.atomic import write_file
from microvlm.errors import UserError
from microvlm.training.data.annotations import (
    NAMES_FILE,
    NAMES_FORMAT,
    ClassNames,
    NamesDocument,
    Parent,
)
from microvlm.training.data.caption_data import SPLITS
from microvlm.training.data.data_folder import ShardedData
from microvlm.training.data.wordnet import WordNet

MOST_BELOW = 100
"""Parents of more classes than this are left out: they say next to nothing."""


def class_names(wordnet: WordNet, wnids: Iterable[str]) -> dict[str, ClassNames]:
    """Names of each class: the words of its concept, and those of the concepts above it.

    A parent's `classes` counts the given classes below it, itself included. Raises UserError for a wnid that the
    database does not have.
    """
    above = {}
    for wnid in dict.fromkeys(wnids):
        try:
            above[wnid] = wordnet.above(int(wnid[1:]))
        except KeyError:
            raise UserError(
                f"{wordnet.path} has no {wnid}: it is not WordNet 3.0, whose numbers wnids are."
            ) from None
    below = Counter(offset for wnid, offsets in above.items() for offset in {int(wnid[1:]), *offsets})
    names = {}
    for wnid, offsets in above.items():
        synonyms = wordnet.concept(int(wnid[1:])).words
        parents: dict[str, int] = {}
        for offset in offsets:
            for word in wordnet.concept(offset).words if below[offset] <= MOST_BELOW else ():
                parents[word] = max(below[offset], parents.get(word, 0))
        listed = [Parent(word, count) for word, count in parents.items() if word not in synonyms]
        names[wnid] = ClassNames(synonyms, tuple(listed))
    return names


def add_names(folder: Path, wordnet_folder: Path) -> dict[str, Any]:
    """Write NAMES_FILE into a data folder, for the classes of all its splits -> a summary. Raises UserError."""
    data = ShardedData(folder)
    samples = Counter(
        line.annotations.wnid
        for split in SPLITS
        for line in data.lines(split)
        if line.annotations is not None and line.annotations.wnid is not None
    )
    if not samples:
        raise UserError(
            f"{folder} has no sample with a wnid, such as n02084071: name the classes in the source's records."
        )
    names = class_names(WordNet(wordnet_folder), sorted(samples))
    write_file(folder / NAMES_FILE, msgspec.json.encode(NamesDocument(NAMES_FORMAT, names)))
    return {
        "output": str(folder / NAMES_FILE),
        "classes": len(names),
        "samples": samples.total(),
        "synonyms": sum(len(row.synonyms) for row in names.values()),
        "parents": sum(len(row.parents) for row in names.values()),
    }
