"""Do `nano` and a full-size model fit a board of 512 MB, and of 448? `nox -s pi-fit` runs it on an emulated one.

Exit status 1: a program that the OOM killer ended, or the full-size model over its bounds in the smaller machine.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pi_files
import wheels

from microvlm.bench.full_bundle import random_full_bundle
from microvlm.bench.pi.fit import Subject, format_fit, measure_fit
from microvlm.bench.pi.package import from_wheel

VOCABULARY = 50_000
FULL = "full"
FULL_TOKENS = 3
"""An emulated full-size model takes seconds a token; memory is at its peak after the first."""
PEAK_BYTES, LEFT_BYTES = 250_000_000, 150_000_000
TIMEOUT_S = 1800


def complaints(runs: list[dict]) -> list[str]:
    """One sentence for each run that does not fit."""
    wrong = [
        f"{run['program']} of {run['model']} ran out of memory in {run['ram_bytes'] >> 20} MiB: {run['oom_victims'][0]}"
        for run in runs
        if run["oom"]
    ]
    for run in runs:
        if run["model"] == FULL and run["peak_rss_bytes"] > PEAK_BYTES:
            wrong.append(
                f"{run['program']} of {FULL} peaks at {run['peak_rss_bytes']} bytes, over {PEAK_BYTES}"
            )
        if run["model"] == FULL and run["available_bytes"] < LEFT_BYTES:
            wrong.append(
                f"{run['program']} of {FULL} leaves {run['available_bytes']} bytes, under {LEFT_BYTES}"
            )
    return wrong


def main(*models: str) -> int:
    """`models`: which of nano and full; both when left out."""
    chosen = models or ("nano", FULL)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "board"
        with wheels.step("wheel and bundle"):
            wheel = pi_files.make(folder)
        subjects = []
        if "nano" in chosen:
            subjects.append(Subject("nano", folder / pi_files.BUNDLE, new_tokens=8))
        if FULL in chosen:
            with wheels.step("full-size bundle"):
                bundle = random_full_bundle(print, vocabulary=VOCABULARY)
            subjects.append(Subject(FULL, bundle, FULL_TOKENS, turns=0))
        with wheels.step("emulated board"):
            found = measure_fit(subjects, pi_files.PICTURE, from_wheel(wheel), timeout_s=TIMEOUT_S)
    print(format_fit(found), json.dumps(found), sep="\n")
    wrong = complaints(found["runs"])
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
