"""Whether `microvlm-bench compare` tells a kernel that is a tenth slower from none: 20 comparisons of each.

The native library is built twice, once as it is and once with a copy of `operators.cpp` in which every call of the
ternary kernel is followed by a wait of a tenth of its own time. Exit status 1 when more than MOST_WRONG of a kind
are wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from microvlm.atomic import write_file
from microvlm.bench.comparison.comparison_bench import Options, SideOptions, run
from microvlm.bench.comparison.judgement import FASTER, SLOWER
from microvlm.bench.comparison.turns import LOAD
from microvlm.bench.report import text

NATIVE = Path(__file__).parent.parent / "backends" / "native"
SLOWDOWN = 0.10
KERNEL = "kernel ternary2x4, 1 token"
MOST_WRONG = 1
CHOICE = "return kernels.ternary_2x4;"
SLOWED = f"""
namespace {{
microvlm::MatrixSums undelayed;
void delayed(const microvlm::Tokens& tokens, const microvlm::Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
             uint8_t* scratch) {{
  using Clock = std::chrono::steady_clock;
  const auto began = Clock::now();
  undelayed(tokens, matrix, begin, end, sums, scratch);
  const auto took = Clock::now() - began;
  const auto until = began + took + std::chrono::duration_cast<Clock::duration>(took * {SLOWDOWN});
  while (Clock::now() < until) {{}}
}}
}}  // namespace
"""


def build(folder: Path, slowed: bool) -> Path:
    """Build the native library in `folder`, as it is or slowed, and return its path."""
    source = folder / "source"
    shutil.copytree(NATIVE, source, ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    if slowed:
        file = source / "operators.cpp"
        code = file.read_text()
        if code.count(CHOICE) != 1:
            sys.exit(f"operators.cpp does not hold '{CHOICE}' once: change compare_bar.py with it.")
        code = code.replace(CHOICE, "undelayed = kernels.ternary_2x4;\n      return delayed;")
        include = '#include "operators.h"\n'
        file.write_text(code.replace(include, f"{include}#include <chrono>\n{SLOWED}", 1))
    for command in (
        ["-S", source, "-B", folder / "build"],
        ["--build", folder / "build", "--target", "microvlm_ops"],
    ):
        subprocess.run(["cmake", *command], check=True, stdout=subprocess.DEVNULL)
    return folder / "build" / "libmicrovlm_ops.so"


def trial(document: dict, slowed: bool) -> dict:
    """What one comparison found, and whether that is right: a slowed kernel is flagged, and nothing else ever."""
    quantities = {entry["name"]: entry for entry in document["quantities"]}
    flagged = [name for name, entry in quantities.items() if entry["verdict"] in (SLOWER, FASTER)]
    verdicts = {entry["verdict"] for entry in quantities.values()}
    if slowed:
        # Phases that run the kernel may be found slower too; loading and the other kernels may not.
        untouched = [name for name in flagged if name == LOAD or "int8" in name]
        right = quantities[KERNEL]["verdict"] == SLOWER and FASTER not in verdicts and not untouched
    else:
        right = not flagged
    elsewhere = [
        abs(entry["value"] - 1) for name, entry in quantities.items() if not name.startswith("kernel")
    ]
    return {
        "slowed": slowed,
        "flagged": flagged,
        "right": right,
        "kernel_ratio": quantities[KERNEL]["value"],
        "largest_elsewhere": round(max(elsewhere), 4),
    }


def trials_document(trials: list[dict], options: Options, provenance: dict) -> dict:
    """The report of kind `trials`."""
    return {
        "report": "trials",
        "slowdown": SLOWDOWN,
        "kernel": KERNEL,
        "pairs": options.pairs,
        "rounds": options.rounds,
        "margin": options.margin,
        "most_wrong": MOST_WRONG,
        "trials": trials,
        "provenance": provenance,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--example", type=Path, help="Write the document of the last slowed comparison here.")
    parser.add_argument("--trials", type=int, default=20)
    arguments = parser.parse_args()
    options = Options()
    trials: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="microvlm-compare-") as folder:
        libraries = {slowed: build(Path(folder, str(slowed)), slowed) for slowed in (False, True)}
        for number in range(2 * arguments.trials):
            # In turns too, so that an hour of another load on the machine is not one kind's alone.
            slowed = number % 2 == 1
            sides = [SideOptions(arguments.bundle, library=libraries[side]) for side in (False, slowed)]
            document = run(*sides, options)
            trials.append(trial(document, slowed))
            print(json.dumps(trials[-1]), file=sys.stderr, flush=True)
            result = trials_document(trials, options, document["provenance"])
            if arguments.output is not None:
                write_file(arguments.output, json.dumps(result, indent=1) + "\n")  # what an hour gave is kept
    if arguments.example is not None:
        write_file(arguments.example, json.dumps(document, indent=1) + "\n")
    print(text(result))
    wrong = [sum(not one["right"] for one in trials if one["slowed"] == slowed) for slowed in (False, True)]
    return int(max(wrong) > MOST_WRONG)


if __name__ == "__main__":
    sys.exit(main())
