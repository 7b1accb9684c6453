"""The records of a board's profile: as a file, and as reports repeat it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.bench.records import PositiveFigure
from microvlm.formats.documents import quote

Cpu = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}\Z")]
"""A CPU's name, as in QEMU's -cpu; it is a part of file names."""

BASES = ("published", "fitted", "assumed", "measured")
"""Basis of a number: somebody published it for this board (or, as its source says, of a close relative); derived
from a published result and counted instructions; not known; measured on the board by `calibrate`."""


class Number(msgspec.Struct, frozen=True):
    """One number of a board."""

    value: PositiveFigure
    basis: str
    """One of BASES."""
    source: Annotated[str, Meta(min_length=1)]

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise ValueError(
                f"its basis is {quote(self.basis)}; a number is {', '.join(BASES[:-1])} or {BASES[-1]}"
            )


class Numbers(msgspec.Struct, frozen=True):
    """All numbers of a board."""

    cores: Number
    clock_hz: Number
    kernel_ipc: Number
    """Instructions a cycle of all cores in the native library."""
    scalar_ipc: Number
    """Instructions a cycle of one core elsewhere."""
    bandwidth_low_bytes_per_s: Number
    bandwidth_high_bytes_per_s: Number
    storage_bytes_per_s: Number
    ram_bytes: Number


class Profile(msgspec.Struct, frozen=True):
    """One board."""

    name: str
    cpu: Cpu
    """The CPU whose instruction counts apply."""
    calibrated: bool
    """Whether somebody measured it on the board."""
    numbers: Numbers

    def __getitem__(self, number: str) -> float:
        return self.entry(number).value

    def entry(self, number: str) -> Number:
        """A number with its basis and source."""
        entry: Number = getattr(self.numbers, number)
        return entry

    def document(self) -> dict[str, Any]:
        """As profiles are written into files and reports."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        return content


NUMBERS: tuple[str, ...] = Numbers.__struct_fields__
