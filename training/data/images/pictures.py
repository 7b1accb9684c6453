"""Looks at one record's pictures: reads, decodes and, where they are large, scales them. Runs in worker processes."""

from __future__ import annotations

import hashlib
import io
import os
from typing import NamedTuple

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.inputs.image_modes import UnreadableImage
from microvlm.inputs.images import NotAPicture, TooLargePicture, load_within
from microvlm.training.data.images.source_record import (
    DAMAGED,
    EMPTY,
    MISSING,
    NOT_A_PICTURE,
    TOO_LARGE,
    TOO_SMALL,
    UNREADABLE,
    BadRecord,
    Picture,
    Skip,
    SourceRecord,
)
from microvlm.training.data.shard_writer import StoredPicture

MAX_SOURCE_BYTES = 128_000_000
"""The largest picture file that is read."""
MAX_KEPT_BYTES = 4_000_000
"""The largest file that is kept as it is; a larger one is stored as a JPEG."""
JPEG_QUALITY = 92
_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif", "PPM": "ppm"}


class PictureLimits(NamedTuple):
    """Sides in pixels: pictures with a shorter one are left out, longer ones are scaled."""

    min_side: int
    max_side: int


class CheckedRecord(NamedTuple):
    """A record with its pictures as they are stored, or without any."""

    record: SourceRecord
    pictures: tuple[StoredPicture, ...] = ()


def check_records(records: list[SourceRecord], limits: PictureLimits) -> list[CheckedRecord]:
    """Look at the pictures of records. A bad picture turns its record into one that is left out."""
    return [_check(record, limits) for record in records]


def _check(record: SourceRecord, limits: PictureLimits) -> CheckedRecord:
    if not record.turns:
        return CheckedRecord(record)
    try:
        pictures = tuple(_store(picture, limits) for picture in record.pictures)
    except BadRecord as problem:
        skip = Skip(problem.reason, problem.detail)
        return CheckedRecord(SourceRecord(record.place, skips=(skip,)))
    # The pictures' own bytes are not sent back beside the stored ones.
    names = tuple(Picture(picture.name) for picture in record.pictures)
    return CheckedRecord(record._replace(pictures=names), pictures)


def _store(picture: Picture, limits: PictureLimits) -> StoredPicture:
    """Raises BadRecord for a picture that cannot be used."""
    content = _read(picture) if picture.content is None else picture.content
    if not content:
        raise BadRecord(EMPTY, picture.name)
    try:
        image, width, height, kind = load_within(content, limits.max_side, picture.name)
    except NotAPicture as error:
        raise BadRecord(NOT_A_PICTURE, str(error)) from None
    except TooLargePicture as error:
        raise BadRecord(TOO_LARGE, str(error)) from None
    except UnreadableImage as error:
        raise BadRecord(UNREADABLE, str(error)) from None
    except UserError as error:
        raise BadRecord(DAMAGED, str(error)) from None
    if min(width, height) < limits.min_side:
        raise BadRecord(TOO_SMALL, f"{picture.name} is {width} x {height} pixels")
    digest = hashlib.sha256(content).hexdigest()
    if max(width, height) <= limits.max_side and len(content) <= MAX_KEPT_BYTES:
        return StoredPicture(content, _EXTENSIONS.get(kind, kind.lower()), digest)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return StoredPicture(file.getvalue(), "jpg", digest)


def _read(picture: Picture) -> bytes:
    """The bytes of a picture file. Raises BadRecord. A pipe or a device is not opened."""
    assert picture.path is not None
    try:
        if os.path.getsize(picture.path) > MAX_SOURCE_BYTES:
            raise BadRecord(TOO_LARGE, f"{picture.name} has more than {MAX_SOURCE_BYTES} bytes")
        return documents.read_file(picture.path, MAX_SOURCE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise BadRecord(MISSING, picture.name) from None
    except UserError as error:
        raise BadRecord(UNREADABLE, str(error).replace(str(picture.path), picture.name)) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise BadRecord(UNREADABLE, f"{picture.name}: {getattr(error, 'strerror', None) or error}") from None
