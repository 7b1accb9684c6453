"""Mutated files of every kind, each used as a user would use it: python tests/fuzz --help.

Each batch runs in a child process, so that a crash ends a batch and not the run. A mutant is named by kind, seed and
number: `--kind KIND --seed SEED --first NUMBER --count 1 --keep FOLDER` makes it again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

BATCH = 250
MAX_SECONDS = 5.0
MAX_MEGABYTES = 1000
STARTUP_SECONDS = 120.0
OUTCOMES = ("loaded", "refused", "defect", "signal", "slow", "large")
"""A mutant is right or refused. Anything else fails: `defect` is a traceback, a sentence that is none, or a wrong
result; `slow` took more than `MAX_SECONDS` of processor time or six times as long by the clock, `large` more than
`MAX_MEGABYTES`."""


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), required=True, help="nano, exported.")
@click.option("--kind", "names", multiple=True, help="Only this kind; may be repeated.")
@click.option("--seed", default=1, show_default=True)
@click.option("--first", default=0, show_default=True, help="Number of the first mutant.")
@click.option("--count", default=100, show_default=True, help="Mutants of each kind.")
@click.option(
    "--json",
    "output",
    type=click.Path(path_type=Path),
    help="Write the counts to a file; in one of the same seed only the rows of the kinds that run change.",
)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep seeds and scratch folders here.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True)
def main(
    bundle: Path, names: tuple[str, ...], seed: int, first: int, count: int, output: Path | None,
    keep: Path | None, jobs: int,
) -> None:  # fmt: skip
    """Use COUNT mutants of each kind; exit status 1 if one was neither right nor refused."""
    from kinds import KINDS
    from seed_files import write_seeds

    from microvlm.bench.report import text

    for name in names:
        if name not in KINDS:
            raise click.UsageError(f"there is no kind '{name}': {', '.join(KINDS)}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        write_seeds(folder / "seeds", bundle)
        batches = [
            (name, start, min(BATCH, first + count - start))
            for start in range(first, first + count, BATCH)
            for name in names or KINDS
        ]
        results: dict[str, list[dict]] = {name: [] for name in names or KINDS}
        others = {} if output is None else _rows_of_other_kinds(output, seed, first, results)
        with ThreadPoolExecutor(jobs) as pool:
            runs = pool.map(lambda batch: _run_batch(folder, batch[0], seed, *batch[1:]), batches)
            for (name, start, _), mutants in zip(batches, runs, strict=True):
                results[name] += mutants
                bad = [each for each in mutants if each["outcome"] not in ("loaded", "refused")]
                print(f"{name} seed {seed} from {start}: {len(mutants)} mutants, {len(bad)} bad", flush=True)
                for each in bad:
                    print(f"  {each['number']} {each['outcome']}: {each['text'][-1500:]}", flush=True)
                if output is not None:  # after every batch: a run of hours may be cut off
                    output.write_text(
                        json.dumps(_document(results, others, seed, first, bundle), indent=1) + "\n"
                    )
    document = _document(results, others, seed, first, bundle)
    print(text(document))
    sys.exit(1 if any(row[outcome] for row in document["kinds"].values() for outcome in OUTCOMES[2:]) else 0)


def _run_batch(folder: Path, name: str, seed: int, first: int, count: int) -> list[dict]:
    """Run mutants FIRST..FIRST+COUNT-1 in child processes; a child that dies is followed by another."""
    mutants: list[dict] = []
    while len(mutants) < count:
        number = first + len(mutants)
        mutants += _run_child(folder, name, seed, number, first + count - number)
    return mutants


def _run_child(folder: Path, name: str, seed: int, first: int, count: int) -> list[dict]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch, tempfile.TemporaryFile() as errors:
        program = [sys.executable, "-P", str(Path(__file__).with_name("child.py"))]
        arguments = [name, str(folder / "seeds"), scratch, str(seed), str(first), str(count)]
        cache = {"MICROVLM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            [*program, *arguments], stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **cache}
        )
        mutants = [json.loads(line) for line in _lines(child)]
        status = child.wait()
        if len(mutants) == count:
            return mutants
        errors.seek(0)
        text = errors.read()[-3000:].decode(errors="replace")
    if not mutants and status > 0:
        raise click.ClickException(f"the child for {name} did not start:\n{text}")
    outcome = "slow" if status == -9 else "signal"
    number = first + len(mutants) if not mutants or "outcome" in mutants[-1] else mutants[-1]["number"]
    return [*mutants, {"number": number, "outcome": outcome, "text": f"status {status}\n{text}"}]


def _lines(child: subprocess.Popen) -> Iterator[bytes]:
    """The child's lines; a child that prints none for too long is killed."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    buffer = b""
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            child.kill()
            return
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return
        deadline = time.monotonic() + 6 * MAX_SECONDS
        *whole, buffer = (buffer + piece).split(b"\n")
        yield from whole


def _rows_of_other_kinds(path: Path, seed: int, first: int, names: dict[str, list[dict]]) -> dict:
    """The rows that an earlier run with the same seed wrote to `path`, of kinds that do not run now."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    if (document["seed"], document["first"]) != (seed, first):
        return {}
    return {name: row for name, row in document["kinds"].items() if name not in names}


def _document(results: dict[str, list[dict]], others: dict, seed: int, first: int, bundle: Path) -> dict:
    kinds = dict(others)
    for name, mutants in results.items():
        counts = Counter(each["outcome"] for each in mutants)
        used = [each for each in mutants if "seconds" in each]
        kinds[name] = {
            "mutants": len(mutants),
            **{outcome: counts[outcome] for outcome in OUTCOMES},
            "slowest_s": max((each["seconds"] for each in used), default=0.0),
            "largest_mb": max((each["megabytes"] for each in used), default=0.0),
        }
    from microvlm.bench.provenance import describe_model, provenance

    return {
        "report": "mutations",
        "seed": seed,
        "first": first,
        "seconds_allowed": MAX_SECONDS,
        "megabytes_allowed": MAX_MEGABYTES,
        "kinds": kinds,
        "provenance": provenance(describe_model(bundle), 1),
    }


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
