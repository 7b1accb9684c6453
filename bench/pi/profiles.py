"""Profiles of boards, JSON files: a few numbers each, with the basis and the source of every one.

`calibrate` writes such a file too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microvlm.errors import UserError

FOLDER = Path(__file__).parent / "profiles"
NUMBERS = (
    "cores",
    "clock_hz",
    "kernel_ipc",
    "scalar_ipc",
    "bandwidth_low_bytes_per_s",
    "bandwidth_high_bytes_per_s",
    "storage_bytes_per_s",
    "ram_bytes",
)
"""`kernel_ipc`: instructions a cycle of all cores in the native library; `scalar_ipc`: of one core elsewhere."""
BASES = ("published", "fitted", "assumed", "measured")
"""Basis of a number: somebody published it for this board (or, as its source says, of a close relative); derived
from a published result and counted instructions; not known; measured on the board by `calibrate`."""
DEFAULT = "zero2w"


@dataclass(frozen=True)
class Profile:
    """One board."""

    name: str
    cpu: str
    """The CPU whose instruction counts apply, as in QEMU's -cpu."""
    calibrated: bool
    """Whether somebody measured it on the board."""
    values: dict[str, float]
    bases: dict[str, str]
    """One of BASES for each."""
    sources: dict[str, str]

    def __getitem__(self, number: str) -> float:
        return self.values[number]

    def document(self) -> dict[str, Any]:
        numbers = {
            name: {"value": self[name], "basis": self.bases[name], "source": self.sources[name]}
            for name in NUMBERS
        }
        return {"name": self.name, "cpu": self.cpu, "calibrated": self.calibrated, "numbers": numbers}


def profile_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_profile(source: str) -> Profile:
    """A board by name, or a JSON file. Raises UserError for what is neither, or lacks a number or its origin."""
    path = FOLDER / f"{source}.json"
    if not path.is_file():
        path = Path(source)
    if not path.is_file():
        raise UserError(
            f"--profile {source} is neither a file nor a board; the boards are {', '.join(profile_names())}."
        )
    try:
        document = json.loads(path.read_text())
        numbers = {name: document["numbers"][name] for name in NUMBERS}
        values = {name: float(entry["value"]) for name, entry in numbers.items()}
        bases = {name: str(entry["basis"]) for name, entry in numbers.items()}
        sources = {name: str(entry["source"]) for name, entry in numbers.items()}
        identity = (document["name"], document["cpu"], bool(document["calibrated"]))
        profile = Profile(*identity, values, bases, sources)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a profile of a board: {error} is missing or wrong.") from None
    wrong = next((name for name in NUMBERS if not (values[name] > 0 and sources[name])), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong} has to be positive, with a source.")
    wrong = next((name for name in NUMBERS if bases[name] not in BASES), None)
    if wrong is not None:
        raise UserError(
            f"{path}: {wrong} is '{bases[wrong]}'; a number is {', '.join(BASES[:-1])} or {BASES[-1]}."
        )
    return profile
