"""Builds the aarch64 wheel as a release does and puts it through `microvlm-bench pi`: arguments are passed on.

With the compiler of the ziglang wheel, instruction counts are the same on every machine. `nox -s pi` provides what it
needs. `--update-baseline` writes new baselines, anything else compares with the committed ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

from side_by_side import side_by_side
from wheels import ROOT, build, step

BASELINES = ROOT / "bench" / "pi" / "baselines"
GATED = "nano"
"""The model of options alone."""
RUNS = (("nano", "equivalence"), ("nano", "cost"), ("photo", "cost"))
"""What every push is held to: models and parts, one on each core. Instructions are counted, not timed: another program
beside it changes none."""


def main(out: Path, arguments: list[str]) -> int:
    with step("build for aarch64"):
        wheel = build("aarch64", out)
    shared = ["--target", "emulated", "--baselines", str(BASELINES)]
    shared += [] if "--update-baseline" in arguments else ["--gate"]
    if arguments and not arguments[0].startswith("-"):
        argument_lists = [arguments]
    elif "--part" in arguments:
        argument_lists = [[GATED, *arguments]]
    else:
        argument_lists = [[model, "--part", part, *arguments] for model, part in RUNS]
    with step("microvlm-bench pi"):
        commands = [["microvlm-bench", "pi", *command, *shared] for command in argument_lists]
        return side_by_side(commands, [{"MICROVLM_WHEEL": str(wheel)}] * len(commands))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
