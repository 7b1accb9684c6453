"""The colours that questions ask about, and how a ground or a drawing gets one. numpy only."""

from __future__ import annotations

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (248, 215, 50),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "pink": (245, 140, 180),
    "brown": (125, 80, 45),
    "black": (20, 20, 22),
    "white": (245, 245, 245),
    "grey": (135, 135, 138),
}
"""Name -> its usual sRGB."""
NAMES = tuple(COLOURS)
_SPREAD = {"black": 10, "white": 8, "grey": 14}
"""Largest change of a channel that keeps the name; 16 for colours with a hue."""


def shade(name: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour near the usual one: the same change of brightness for all channels, and a smaller one for each."""
    spread = _SPREAD.get(name, 16)
    common = rng.uniform(-spread, spread)
    own = rng.uniform(-spread / 3, spread / 3, 3)
    red, green, blue = np.clip(np.array(COLOURS[name]) + common + own, 0, 255).astype(int)
    return int(red), int(green), int(blue)
