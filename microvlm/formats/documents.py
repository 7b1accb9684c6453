"""Documents from outside: JSON of a stated type and bounded size, parsed into records by msgspec.

Every JSON file, line or header that this package did not just write itself is read here. A type is a frozen
`msgspec.Struct` or dataclass, whose numbers have ranges (`Size`, `Count`, `Number`); after parsing nothing has to be
looked up by name or cast. What is wrong is one sentence with the document's and the key's name. Imports no torch.

A union of a number or text that has a range with a tuple of fixed length (`Size | tuple[int, int]`) corrupts memory in
msgspec 0.22; a list with `min_length` and `max_length` does not.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec
from msgspec import Meta

from microvlm.console import describe_os_error
from microvlm.errors import UserError
from microvlm.escaping import printable

MAX_DOCUMENT_BYTES = 64_000_000
"""The largest JSON document that is read: the tokenizer.json of a vocabulary of 250,000 tokens has 35 MB."""
_LONGEST_QUOTE = 60

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
"""A length of something: at least 1, and at most what 32 bits hold."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""A number of things or of bytes; as a JSON number it is exact."""
Number = float
"""Any JSON number. JSON has neither NaN nor infinity, and a number too large for a double is refused."""
PositiveNumber = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

T = TypeVar("T")

_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def parse(content: bytes | str, kind: type[T], origin: object, remedy: str) -> T:
    """Parse a JSON document -> a value of type `kind`.

    `origin` names the document in errors, and `remedy` says what to do about a damaged one. A byte order mark is
    skipped. Raises UserError, one sentence with the name of the key.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        return msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, origin, remedy) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise UserError(f"{origin} is not valid JSON: {remedy}.") from None
    except RecursionError:
        raise UserError(f"{origin} is nested too deeply: {remedy}.") from None


def convert(value: Any, kind: type[T], origin: object, remedy: str) -> T:
    """Check a value of Python's own types (dict, list, str, int, float, bool, None) and convert it to type `kind`.

    Raises UserError as `parse` does, also for infinity and NaN.
    """
    try:
        if not _is_finite(value):
            raise UserError(f"{origin} has a number that is not finite: {remedy}.")
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, origin, remedy) from None
    except RecursionError:
        raise UserError(f"{origin} is nested too deeply: {remedy}.") from None


def load(path: str | Path, kind: type[T], remedy: str, limit: int = MAX_DOCUMENT_BYTES) -> T:
    """Read a JSON file of at most `limit` bytes -> a value of type `kind`.

    Raises FileNotFoundError, whose meaning the caller knows, and UserError for everything else.
    """
    return parse(read_file(path, limit), kind, path, remedy)


def read_file(path: str | Path, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises FileNotFoundError, and UserError as `open_regular` does and for a larger file.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit:,} bytes, too many for what it is; give another file.")
    return content


@contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading bytes.

    Raises FileNotFoundError, and UserError for a pipe, a device, a folder and other errors of the file system, inside
    the block too. A pipe is not waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(describe_os_error(error)) from None
    except ValueError:  # a name with a null character
        raise UserError(f"{printable(str(path))!r} is not the name of a file.") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise UserError(f"{path} is {kind}, no regular file; give another name.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise UserError(describe_os_error(error)) from None
    finally:
        os.close(descriptor)


def quote(value: object) -> str:
    """A value of a document as errors show it: on one line, only of characters that print, and shortened."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in printable(str(value))
    )
    return f"'{text}'" if len(text) <= _LONGEST_QUOTE else f"'{text[:_LONGEST_QUOTE]}…'"


def _invalid(error: msgspec.ValidationError, origin: object, remedy: str) -> UserError:
    """The sentence for an error of msgspec, whose text is "PROBLEM - at `$.PATH`"."""
    problem, _, place = str(error).partition(" - at `")
    if isinstance(
        error.__cause__, UserError
    ):  # of a record that programs build too, and that has its own sentence
        problem = str(error.__cause__.args[0])
    key = place.removesuffix("`").removeprefix("$").removeprefix(".")
    match = re.fullmatch(r"Object (?:missing required|contains unknown) field `(.*)`", problem, re.DOTALL)
    if match:
        name = quote(".".join(part for part in (key, match[1]) if part))
        what = "is missing" if "missing" in problem.partition("`")[0] else "is not known to this version"
        return UserError(f"{origin}: {name} {what}: {remedy}.")
    subject = quote(key) if key else "the document"
    match = re.fullmatch(r"Expected (.*?)(?:, got (.*))?", problem, re.DOTALL)
    if match:
        expected, actual = (re.sub(r"`(.*?)`", _type_words, side or "") for side in match.groups())
        contrast = f", not {actual}" if actual else ""
        return UserError(f"{origin}: {subject} must be {expected}{contrast}: {remedy}.")
    match = re.fullmatch(r"Invalid enum value '?(.*?)'?", problem, re.DOTALL)
    if match:
        return UserError(f"{origin}: {subject} has the unknown value {quote(match[1])}: {remedy}.")
    return UserError(f"{origin}: {subject}: {printable(problem[:1].lower() + problem[1:])}: {remedy}.")


def _type_words(names: re.Match[str]) -> str:
    """What msgspec calls `int | str`, in words."""
    kinds = names[1].split(" | ")
    return " or ".join(
        _TYPE_WORDS.get(kind, kind) for kind in kinds if not (kind == "int" and "float" in kinds)
    )


def depth_of(value: Any) -> int:
    """Levels of lists and objects in a parsed document. Python's writer gives up before msgspec's parser does."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        depth += 1
        level = [each for inner in level for each in (inner.values() if isinstance(inner, dict) else inner)]
    return depth


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
