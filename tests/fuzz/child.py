"""Uses mutants of one kind: child.py KIND SEEDS SCRATCH SEED FIRST COUNT prints a JSON line for each."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))
import kinds

from microvlm.errors import UserError
from microvlm.escaping import printable

MAX_SECONDS = 5.0
MAX_MEGABYTES = 1000
LONGEST_SENTENCE = 5000  # the name of a file may have 4,096 characters


def main() -> None:
    name, seeds, scratch, seed, first, count = sys.argv[1:]
    faulthandler.enable()
    # Results have a descriptor of their own: what is tested may close or write to stdout.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    kind = kinds.KINDS[name](Path(seeds), Path(scratch))
    kind.check()
    for number in range(int(first), int(first) + int(count)):
        kind.write(Random(f"{seed} {name} {number}"))
        print(json.dumps({"number": number, **_use(kind)}), file=results, flush=True)


def _use(kind: kinds.Kind) -> dict:
    _forget_peak()
    start = _processor_seconds()
    outcome, text = "loaded", ""
    try:
        kind.use()
    except (UserError, kinds.Refused) as error:
        outcome, text = "refused", str(error).rstrip("\n")
        if not text or "Traceback" in text or not _is_sentences(text):
            outcome = "defect"
    except BaseException:
        outcome, text = "defect", traceback.format_exc()
    seconds, megabytes = _processor_seconds() - start, _peak_megabytes()
    if outcome in ("loaded", "refused") and seconds > MAX_SECONDS:
        outcome = "slow"
    if outcome in ("loaded", "refused") and megabytes > MAX_MEGABYTES:
        outcome = "large"
    return {
        "outcome": outcome,
        "text": text,
        "seconds": round(seconds, 3),
        "megabytes": round(megabytes, 1),
    }


def _is_sentences(text: str) -> bool:
    return all(printable(line) == line and len(line) <= LONGEST_SENTENCE for line in text.split("\n"))


def _processor_seconds() -> float:
    """Of this process and its children. Unlike the clock's, they do not depend on what else the machine does."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # the peak of the whole process is then shown
        Path("/proc/self/clear_refs").write_text("5")


def _peak_megabytes() -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


if __name__ == "__main__":
    main()
