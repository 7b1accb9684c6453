"""Profiles of boards, JSON files: a few numbers each, with the basis and the source of every one.

`calibrate` writes such a file too.
"""

from __future__ import annotations

from pathlib import Path

from microvlm.bench.pi.profile_records import NUMBERS, Number, Numbers, Profile
from microvlm.errors import UserError
from microvlm.formats import documents

__all__ = ["DEFAULT", "FOLDER", "NUMBERS", "Number", "Numbers", "Profile", "load_profile", "profile_names"]
FOLDER = Path(__file__).parent / "profiles"
DEFAULT = "zero2w"
LARGEST_FILE = 1_000_000
"""Bytes; a calibrated profile also holds tables of its measurements."""
_REMEDY = "mend this entry, or start again from one of the profiles in bench/pi/profiles"


def profile_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_profile(source: str) -> Profile:
    """A board by name, or a JSON file. Raises UserError for what is neither, or lacks a number or its origin."""
    path = FOLDER / f"{source}.json" if source in profile_names() else Path(source)
    try:
        return documents.load(path, Profile, _REMEDY, LARGEST_FILE)
    except FileNotFoundError:
        names = ", ".join(profile_names())
        raise UserError(
            f"--profile {documents.quote(source)} is neither a file nor a board; the boards are {names}."
        ) from None
