"""Do bundled models and a full-size one fit a board of 512 MB, and of 448? `nox -s pi-fit` runs it on an emulated one.

Exit status 1: a program that the OOM killer ended, or the full-size model over its bounds in the smaller machine.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pi_files
import wheels

from microvlm.atomic import write_file
from microvlm.bench import report
from microvlm.bench.full.random_bundle import random_full_bundle
from microvlm.bench.pi.board import memory_fit
from microvlm.bench.pi.counting.emulated_package import from_wheel
from microvlm.bench.provenance import describe_model, provenance
from microvlm.sources.model_source import BUNDLED

VOCABULARY = 50_000
FULL = "full"


def main(*arguments: str) -> int:
    """`arguments`: which of photo, nano and full, and which of caption, chat and serve, all when left out; then
    -o FILE.json to save the report."""
    words, _, output = " ".join(arguments).partition("-o ")
    programs = [word for word in words.split() if word in memory_fit.PROGRAMS] or memory_fit.PROGRAMS
    chosen = [word for word in words.split() if word not in memory_fit.PROGRAMS] or [*BUNDLED, FULL]
    bundled = [name for name in BUNDLED if name in chosen]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "board"
        with wheels.step("wheel and bundle"):
            wheel = pi_files.make(folder, *bundled)
        subjects = [memory_fit.FittedModel(name, folder / pi_files.bundle_of(name)) for name in bundled]
        if FULL in chosen:
            with wheels.step("full-size bundle"):
                bundle = random_full_bundle(print, vocabulary=VOCABULARY)
            subjects.append(memory_fit.full_size_model(FULL, bundle))
        measured = describe_model(subjects[0].bundle)
        package = from_wheel(wheel)
        with wheels.step("what an emulated board starts from"):
            memory_fit.open_model_board(min(memory_fit.RAM_MB), {}, pi_files.PICTURE, package)
        runs: list[dict[str, Any]] = []
        for size in memory_fit.RAM_MB:
            with wheels.step(f"emulated board with {size} MB"):
                picture = pi_files.PICTURE
                runs += memory_fit.run_programs(subjects, picture, package, size, programs=programs)
    document = {"report": "fit", "fit": memory_fit.summarise(runs), "provenance": provenance(measured, None)}
    print(report.text(document), json.dumps(document), sep="\n")
    if output:
        write_file(output, json.dumps(document, indent=1) + "\n")
    wrong = memory_fit.complaints(subjects, runs)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
