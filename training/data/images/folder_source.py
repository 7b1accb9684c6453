"""Pictures in folders: captions in a file beside each picture, or, where there is none, the folders' names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.training.data.annotations import find_annotations
from microvlm.training.data.images.conversation import Columns, as_label, find_turns
from microvlm.training.data.images.source_record import (
    BAD_RECORD,
    NO_CAPTION,
    BadRecord,
    Picture,
    Skip,
    SourceRecord,
)

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pnm", ".ico"),
)
TEXT_SUFFIXES = (".txt", ".caption")
MAX_CAPTION_FILE = 1_000_000
"""Most bytes of a caption file."""


class FolderSource:
    """Every picture below a folder, in the order of its path. Hidden files and folders are left out."""

    def __init__(self, folder: Path, columns: Columns, max_text: int):
        """Look whether there are captions. Raises UserError for a folder without pictures, or without both captions
        and sub-folders for labels."""
        self.folder, self.columns, self.max_text = folder, columns, max_text
        self.name = folder.resolve().name
        found = has_label = False
        for path in self._pictures():
            found = True
            if self._caption_file(path) is not None:
                self.kind = "folder"
                return
            has_label |= path.parent != folder
        if not found:
            raise UserError(f"{folder} holds no pictures, captions or shards; give another SOURCE.")
        if not has_label:
            raise UserError(
                f"{folder} has pictures and no captions; write a.txt beside a.jpg, or a captions.jsonl with lines "
                '{"image": "a.jpg", "caption": "..."}.'
            )
        self.kind = "labels"

    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in self._pictures():
            digest.update(os.fsencode(path.relative_to(self.folder)) + b"\0")
        return digest.hexdigest()

    def records(self, start: int) -> Iterator[SourceRecord]:
        for number, path in enumerate(self._pictures()):
            if number >= start:
                yield self._record(path)

    def _record(self, path: Path) -> SourceRecord:
        name = path.relative_to(self.folder).as_posix()
        try:
            row = {"label": as_label(path.parent.name)} if self.kind == "labels" else self._read(path)
            turns, skips = find_turns(row, self.columns, 1, self.max_text)
            picture = Picture(name, path=path)
            return SourceRecord(name, (picture,), turns, skips, find_annotations(row))
        except BadRecord as problem:
            return SourceRecord(name, skips=(Skip(problem.reason, problem.detail),))

    def _read(self, picture: Path) -> dict[str, Any]:
        """The record in the caption file of a picture. Raises BadRecord without one."""
        path = self._caption_file(picture)
        if path is None:
            raise BadRecord(NO_CAPTION, "no .txt, .caption or .json beside the picture")
        try:
            content = documents.read_file(path, MAX_CAPTION_FILE)
            if path.suffix == ".json":
                return documents.parse(content, dict[str, Any], path.name, "write one JSON object")
        except FileNotFoundError:
            raise BadRecord(NO_CAPTION) from None
        except UserError as error:
            raise BadRecord(BAD_RECORD, str(error).replace(f"{self.folder}{os.sep}", "")) from None
        return {self.columns.caption or "caption": content.decode("utf-8-sig", "surrogateescape")}

    def _caption_file(self, picture: Path) -> Path | None:
        paths = (picture.with_suffix(suffix) for suffix in (*TEXT_SUFFIXES, ".json"))
        return next((path for path in paths if path.is_file()), None)

    def _pictures(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."):
                    yield Path(folder, name)
