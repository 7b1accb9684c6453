"""The photographs that models which see photographs are timed and compared on, with what each shows."""

from __future__ import annotations

from pathlib import Path

import msgspec

from microvlm.formats import documents

_FOLDER = Path(__file__).with_name("photographs")


class BenchPhotograph(msgspec.Struct, frozen=True):
    """A photograph under free terms."""

    file: str
    shows: str
    author: str
    licence: str
    source: str
    also: tuple[str, ...] = ()
    """Other names that are as right as `shows`."""

    @property
    def path(self) -> Path:
        return _FOLDER / self.file


def read_photographs() -> list[BenchPhotograph]:
    """All photographs, in the order of photographs.json. Raises UserError for a damaged installation."""
    path = _FOLDER / "photographs.json"
    return list(
        documents.parse(documents.read_file(path), list[BenchPhotograph], path, "install microvlm again")
    )
