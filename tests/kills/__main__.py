"""Kills writers of memory, checkpoint, bundle and bundle cache: python tests/kills --help.

Each is killed before every system call that changes files, and at random moments. Then what a reader finds has to be
old or new, and whole; the next command has to work, and nothing may be left behind after it.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))

from traced import can_trace, kill_after, kill_at_call
from writers import NEW, OLD, CacheWriter, CheckpointWriter, ExportWriter, MemoryWriter, Writer

from microvlm.bench.provenance import describe_model, provenance
from microvlm.bench.report import text

TRACED_EXPORTS = 40
"""One export in so many is traced anew, which takes seconds."""


@dataclass
class Kills:
    """The kills of one writer, and what was found after them."""

    writer: str
    at_calls: int = 0
    at_random: int = 0
    found_old: int = 0
    found_new: int = 0
    with_leftovers: int = 0
    """Kills after which there were files for the next command to clean up."""
    seconds: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)


def run_kills(count: int, seed: int, bundle: Path, folder: Path, stride: int = 1) -> list[Kills]:
    """Kill each writer before every `stride`-th call and at `count` random moments.

    `bundle` is one with a tokenizer; `folder` is for scratch files. Raises AssertionError, with seed and number of the
    kill, for the first that leaves anything but an old or a new state, or that the next command does not get over.
    """
    writers: list[Writer] = []
    for name in ("write", "overwrite", "checkpoint", "shared", "export", "cache", "tracing"):
        (folder / name).mkdir()
    scratch = folder / "scratch"
    writers.append(MemoryWriter(folder / "write", bundle, overwrite=False))
    writers.append(MemoryWriter(folder / "overwrite", bundle, overwrite=True))
    writers.append(CheckpointWriter(folder / "checkpoint", shared=False))
    writers.append(CheckpointWriter(folder / "shared", shared=True))
    writers.append(ExportWriter(folder / "export", scratch))
    writers.append(CacheWriter(folder / "cache", scratch))
    results = [_kill(writer, count, seed, stride) for writer in writers]
    tracing = ExportWriter(folder / "tracing", scratch, real=True)
    results.append(_kill_at_random(tracing, count // TRACED_EXPORTS, seed))
    return results


def _kill(writer: Writer, count: int, seed: int, stride: int) -> Kills:
    kills, expected = Kills(writer.name), _changed(writer)
    number = random.Random(seed).randrange(stride)
    began = time.perf_counter()
    while True:
        writer.prepare()
        call = kill_at_call(writer.change, number)
        _check(writer, kills, expected, f"call {number} ({call})")
        if call is None:
            break
        kills.at_calls += 1
        kills.calls[call] += 1
        number += stride
    kills.seconds = time.perf_counter() - began
    return _kill_at_random(writer, count, seed, kills)


def _kill_at_random(writer: Writer, count: int, seed: int, kills: Kills | None = None) -> Kills:
    kills = kills or Kills(writer.name)
    began, rng = time.perf_counter(), random.Random(f"{writer.name} {seed}")
    if count:
        expected, duration = _changed(writer), _duration(writer)
    while kills.at_random < count:
        writer.prepare()
        seconds = rng.uniform(0, duration)
        if kill_after(writer.change, seconds):
            kills.at_random += 1
            _check(writer, kills, expected, f"seed {seed}, random kill {kills.at_random} ({seconds:.4f} s)")
        else:  # it was done sooner than the first time
            duration = max(seconds, duration * 0.9)
    kills.seconds = round(kills.seconds + time.perf_counter() - began, 1)
    return kills


def _changed(writer: Writer) -> list[str]:
    """What is in the folder of a writer that was not killed."""
    writer.prepare()
    writer.change()
    assert writer.look() == NEW
    return writer.listing()


def _duration(writer: Writer) -> float:
    """Seconds that a change takes in a child."""
    writer.prepare()
    began = time.perf_counter()
    assert not kill_after(writer.change, None)
    return time.perf_counter() - began


def _check(writer: Writer, kills: Kills, expected: list[str], moment: str) -> None:
    try:
        kills.with_leftovers += writer.listing() != expected
        state = writer.look()
        kills.found_old += state == OLD
        kills.found_new += state == NEW
        writer.change()
        assert writer.look() == NEW, "the next command did not change anything"
        left = sorted(set(writer.listing()) ^ set(expected))
        assert not left, f"left behind or lost: {left}"
    except BaseException as error:
        raise AssertionError(f"{writer.name}, killed at {moment}: {type(error).__name__}: {error}") from error


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path, exists=True), required=True, help="One with a tokenizer."
)
@click.option("--count", default=200, show_default=True, help="Random moments for each writer.")
@click.option("--seed", default=1, show_default=True)
@click.option("--stride", default=1, show_default=True, help="Kill before every so many-th call.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the counts to a file.")
def main(bundle: Path, count: int, seed: int, stride: int, output: Path | None) -> None:
    """Kill every writer; exit status 1 with a traceback at the first that is not old or new."""
    if not can_trace():
        raise click.ClickException("system calls cannot be traced here: it takes Linux on x86-64 or aarch64.")
    with tempfile.TemporaryDirectory() as name:
        results = run_kills(count, seed, bundle, Path(name), stride)
    document = {
        "report": "kills",
        "seed": seed,
        "writers": {kills.writer: vars(kills) for kills in results},
        "provenance": provenance(describe_model(bundle), None),
    }
    click.echo(text(document))
    if output:
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
