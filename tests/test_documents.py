"""Documents from outside become typed records, or one sentence with the document's and the key's name."""

from __future__ import annotations

import json
import os
from typing import Literal

import msgspec
import pytest

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count, Sha256, Size


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Size
    names: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ValueError("size must not be 13")


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    part: Part
    bytes: Count = 0
    sha256: Sha256 | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    free: dict[str, object] | None = None
    side: Literal["left", "right"] = "left"


def sentence(content: bytes | str) -> str:
    with pytest.raises(UserError) as caught:
        documents.parse(content, Document, "a.json", "copy it again")
    return str(caught.value)


def test_a_right_document_becomes_a_record():
    record = documents.parse(
        '\ufeff{"part": {"size": 3}, "mean": [1, 2, 3.5]}', Document, "a.json", "copy it"
    )
    assert record == Document(Part(3), mean=(1.0, 2.0, 3.5))


@pytest.mark.parametrize(
    ("content", "start"),
    [
        ('{"part": {"size": "x"}}', "a.json: 'part.size' must be a whole number, not text"),
        ('{"part": {"size": null}}', "a.json: 'part.size' must be a whole number, not null"),
        ('{"part": {"size": true}}', "a.json: 'part.size' must be a whole number, not true or false"),
        ('{"part": {"size": 0}}', "a.json: 'part.size' must be a whole number >= 1"),
        ('{"part": {"size": 13}}', "a.json: 'part': size must not be 13"),
        ('{"part": {"size": ' + "9" * 5000 + "}}", "a.json: 'part.size': integer value out of range"),
        ('{"part": {}}', "a.json: 'part.size' is missing"),
        ("{}", "a.json: 'part' is missing"),
        ('{"part": {"size": 1}, "side": "up"}', "a.json: 'side' has the unknown value 'up'"),
        ('{"part": {"size": 1}, "side": "' + "z" * 5000 + '"}', "a.json: 'side' has the unknown value 'zzz"),
        ("[]", "a.json: the document must be an object, not a list"),
        ('{"part": {"size": 1}, "x\\u001b[31m": 1}', "a.json: 'x\\x1b[31m' is not known to this version"),
        ('{"part": {"size": 1}, "' + "y" * 5000 + '": 1}', "a.json: '" + "y" * 60 + "…' is not known"),
        ('{"part": {"size": 1}, "sha256": 3}', "a.json: 'sha256' must be text or null, not a whole number"),
        ('{"part": {"size": 1}, "sha256": "ff"}', "a.json: 'sha256' must be text"),
        ('{"part": {"size": 1}, "mean": [1, 2]}', "a.json: 'mean' must be a list of length 3"),
        ('{"part": {"size": 1}, "mean": [1, 2, 1e999]}', "a.json: 'mean[2]': number out of range"),
        ('{"part": {"size": 1}, "free": ' + '{"a":' * 100_000, "a.json is nested too deeply"),
        ('{"part": {"size": NaN}}', "a.json is not valid JSON"),
        ("{", "a.json is not valid JSON"),
        ("", "a.json is not valid JSON"),
        (b'{"part": {"size": 1, "names": {"a": "\xff"}}}', "a.json is not valid JSON"),
    ],
)
def test_a_wrong_document_is_one_sentence_with_the_name_of_the_key(content, start):
    text = sentence(content)
    assert text.startswith(start)
    assert text.endswith(": copy it again.")
    assert len(text) < 200
    assert text.isprintable()


def test_values_of_python_are_checked_by_the_same_types():
    assert documents.convert({"part": {"size": 2}}, Document, "it", "mend it") == Document(Part(2))
    for value, start in (
        ({"part": {"size": 0}}, "it: 'part.size' must be a whole number >= 1"),
        ({"part": {"size": 2}, "mean": [1.0, 2.0, float("inf")]}, "it has a number that is not finite"),
    ):
        with pytest.raises(UserError, match=start):
            documents.convert(value, Document, "it", "mend it")


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"part": {"size": 3}}))
    assert documents.load(path, Document, "copy it") == Document(Part(3))
    with pytest.raises(UserError, match="more than 10 bytes"):
        documents.load(path, Document, "copy it", limit=10)
    with pytest.raises(FileNotFoundError):
        documents.load(tmp_path / "missing.json", Document, "copy it")
    with pytest.raises(UserError, match="is a folder"):
        documents.load(tmp_path, Document, "copy it")
    with pytest.raises(UserError, match="not the name of a file"):
        documents.load("a\0b", Document, "copy it")


@pytest.mark.posix
def test_a_pipe_and_a_device_are_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        with pytest.raises(UserError, match="a pipe or a device"):
            documents.load(path, Document, "copy it")


def test_the_depth_of_a_document_is_counted_without_recursion():
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert documents.depth_of(value) == 100_001
    assert documents.depth_of({"a": [{"b": 1}, 2], "c": None}) == 3
    assert documents.depth_of("text") == 0
