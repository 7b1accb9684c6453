"""Builds the aarch64 wheel as a release does and puts it through `microvlm-bench pi`: arguments are passed on.

With the compiler of the ziglang wheel, instruction counts are the same on every machine. `nox -s pi` provides what it
needs. `--update-baseline` writes new baselines, anything else compares with the committed ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from wheels import ROOT, build, step

BASELINES = ROOT / "bench" / "pi" / "baselines"
PARTS = ("--part", "equivalence", "--part", "cost")


def main(out: Path, arguments: list[str]) -> int:
    with step("build for aarch64"):
        wheel = build("aarch64", out)
    chosen = [argument for argument in arguments if not argument.startswith("-")]
    command = ["microvlm-bench", "pi", *(arguments if chosen else ["nano", *PARTS, *arguments])]
    command += ["--target", "emulated", "--baselines", str(BASELINES)]
    command += [] if "--update-baseline" in arguments else ["--gate"]
    with step("microvlm-bench pi"):
        return subprocess.run(command, env={**os.environ, "MICROVLM_WHEEL": str(wheel)}).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
