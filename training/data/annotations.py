"""What a picture is known to show, beside what people say about it: its class with other names, and its objects.

Scores are made from it; no trainer reads it. Names of classes that WordNet gives lie in a file of their own,
`NAMES_FILE` of a data folder, which `microvlm-data names` writes.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.formats.documents import Size

NAMES_FILE = "names.json"
NAMES_FORMAT = "microvlm-names-1"

Name = Annotated[str, Meta(min_length=1, max_length=300)]
Wnid = Annotated[str, Meta(pattern=r"^n[0-9]{8}\Z")]
"""A noun of WordNet 3.0, as ImageNet names its classes."""
Names = Annotated[tuple[Name, ...], Meta(max_length=1000)]


class Parent(msgspec.Struct, frozen=True):
    """A more general name, and how many classes of the data it is true of."""

    name: Name
    classes: Size


Parents = Annotated[tuple[Parent, ...], Meta(max_length=1000)]


class NamedObject(msgspec.Struct, frozen=True, omit_defaults=True):
    """An object in the picture."""

    name: Name
    bbox: tuple[float, float, float, float] | None = None
    """Left, top, width and height in pixels of the picture that the source says."""


class Annotations(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known about a sample's picture; all of it may be missing."""

    label: Name | None = None
    wnid: Wnid | None = None
    synonyms: Names = ()
    parents: Parents = ()
    objects: Annotated[tuple[NamedObject, ...], Meta(max_length=1000)] = ()


class ClassNames(msgspec.Struct, frozen=True):
    """Other names of a class, and its parents, the most special first."""

    synonyms: Names
    parents: Parents


class NamesDocument(msgspec.Struct, frozen=True):
    """The content of `NAMES_FILE`."""

    format: str
    classes: dict[Wnid, ClassNames]


_FIELDS = {field.name: field.type for field in msgspec.structs.fields(Annotations)}
ANNOTATION_KEYS = tuple(_FIELDS)
"""Keys of a record that are annotations."""


def find_annotations(row: dict[str, Any]) -> Annotations | None:
    """The annotations of a source's record. Keys whose values are of another kind mean something else: not taken."""
    found: dict[str, Any] = {}
    for name, kind in _FIELDS.items():
        value = row.get(name)
        if value in (None, "", [], ()):
            continue
        try:
            found[name] = msgspec.convert(value, kind)
        except (msgspec.ValidationError, RecursionError):
            continue
    return Annotations(**found) if found else None


def with_names(annotations: Annotations, classes: dict[str, ClassNames]) -> Annotations:
    """The annotations with the names of their class, behind the source's own."""
    names = classes.get(annotations.wnid or "")
    if names is None:
        return annotations
    return msgspec.structs.replace(
        annotations,
        synonyms=tuple(dict.fromkeys([*annotations.synonyms, *names.synonyms])),
        parents=(*annotations.parents, *names.parents),
    )
