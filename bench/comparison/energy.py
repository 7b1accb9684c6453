"""Joules that the processor used, from the counters that Linux exposes (RAPL, /sys/class/powercap), where it does.

A counter is of the whole package, whoever used it, and wraps round at a value of its own. Virtual machines and ARM
boards have none, and on many systems only root may read it.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
NOT_EXPOSED = "energy: not exposed here (no readable RAPL counter below /sys/class/powercap)"


class EnergyCounter:
    """The sum of the packages' counters since the last call."""

    def __init__(self, zones: list[Path]):
        self._zones = zones
        self._ranges = [_microjoules(zone / "max_energy_range_uj") for zone in zones]
        self._last = self._read()

    @classmethod
    def find(cls, root: Path = POWERCAP) -> EnergyCounter | None:
        """The counter of every package; None where there is none that this user may read."""
        # intel-rapl:0 is a package (AMD's too); intel-rapl:0:1 is a part of it.
        zones = [zone for zone in sorted(root.glob("*-rapl:*")) if zone.name.count(":") == 1]
        try:
            return cls(zones) if zones else None
        except (OSError, ValueError):
            return None

    def joules(self) -> float:
        """Joules since the last call, or since the counter was made."""
        now = self._read()
        steps = zip(now, self._last, self._ranges, strict=True)
        used = sum((new - old) if new >= old else (new + size - old) for new, old, size in steps)
        self._last = now
        return used * 1e-6

    def _read(self) -> list[int]:
        return [_microjoules(zone / "energy_uj") for zone in self._zones]


def _microjoules(path: Path) -> int:
    return int(path.read_text())
