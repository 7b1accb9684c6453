"""Does a model fit a board: `microvlm caption` and a chat with memory, whole programs in an emulated machine with the
memory of one, no swap, and Debian's kernel to say what they took.

Peaks and the OOM killer there are evidence; times are not, and are not reported. The machine runs nothing else: what a
board's own services need has to come out of `available_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microvlm.backends.emulation import runtime_requirements
from microvlm.bench.pi.board.emulated_board import System, open_system
from microvlm.bench.pi.board.guest_program import Command, Outcome
from microvlm.bench.pi.counting.emulated_package import Package
from microvlm.errors import UserError

RAM_MB = (512, 448)
"""A Pi Zero 2 W's memory, and what it has left when 64 MB belong to the graphics processor."""
TURNS = 10
QUESTIONS = ("what is on the left?", "what was in the first image?")
PICTURE_THERE = "picture.png"
FULL_TURNS = 4
"""Of a full-size chat: a picture, a question, a recall, a question. A turn takes a minute on two cores here."""
NANO_TOKENS, FULL_TOKENS = 8, 3
"""Longest answers. An emulated full-size model takes seconds a token; memory is at its peak after the first."""
PEAK_BYTES, LEFT_BYTES = 250_000_000, 150_000_000
"""At full size: the largest resident set of a program that loads and decodes, which a caption is, and what any program
has to leave to others. A chat also has the memory's graphs and states."""
TIMEOUT_S = 3600
"""For one machine, which is minutes for the full size, here, and more on busy cores."""


@dataclass(frozen=True)
class Subject:
    """A model and how much it is asked."""

    name: str
    bundle: Path
    new_tokens: int = NANO_TOKENS
    """The longest answer."""
    turns: int = TURNS
    """Of the chat; 0 for none."""
    chats_up_to_mb: int = max(RAM_MB)
    """The largest machine that it chats in; in larger ones it only captions."""
    bounded: bool = False
    """Is it held to PEAK_BYTES and LEFT_BYTES?"""


def full_subject(name: str, bundle: Path) -> Subject:
    """A full-size bundle: short answers, few turns, those where memory is tightest alone, and held to the bounds."""
    return Subject(name, bundle, FULL_TOKENS, FULL_TURNS, chats_up_to_mb=min(RAM_MB), bounded=True)


def measure_fit(
    subjects: Sequence[Subject],
    picture: Path,
    package: Package,
    ram_mb: Sequence[int] = RAM_MB,
    backend: str = "ort",
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """Starts one machine for each size of memory and runs every subject's caption and chat in it, one after another.

    Returns `ram_bytes`, `peak_rss_bytes`, `available_bytes` (the least MemAvailable) and `oom` of the tightest run, and
    all `runs`. Raises UserError for a program that fails for another reason than memory.
    """
    runs = []
    for size in ram_mb:
        tasks = [task for subject in subjects for task in _tasks(subject, backend, size)]
        system = open_board(size, {each.name: each.bundle for each in subjects}, picture, package)
        outcomes = system.run([command for _, _, command in tasks], timeout_s)
        for (model, program, _), outcome in zip(tasks, outcomes, strict=True):
            runs.append(
                {"model": model, "program": program, **_row(system, outcome, f"{program} of {model}")}
            )
    return summarise(runs)


def open_board(
    ram_mb: int, bundles: Mapping[str, Path], picture: Path, package: Package, cores: int = 4
) -> System:
    """The machine with `bundles` in /srv/models, the picture, and this package in its Python. Raises UserError."""
    files: dict[str, Path | str] = {f"models/{name}": bundle for name, bundle in bundles.items()}
    files[PICTURE_THERE] = picture
    return open_system(
        ram_mb,
        cores,
        requirements=runtime_requirements(),
        packages=package.contents,
        files=files,
    )


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tightest run's four figures (an OOM first, then what left the least memory), and all runs."""
    tightest = min(runs, key=lambda run: (not run["oom"], run["available_bytes"]))
    keys = ("ram_bytes", "peak_rss_bytes", "available_bytes", "oom")
    return {**{key: tightest[key] for key in keys}, "runs": [dict(run) for run in runs]}


def complaints(subjects: Sequence[Subject], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each run that does not fit."""
    bounded = {subject.name for subject in subjects if subject.bounded}
    wrong = [
        f"{run['program']} of {run['model']} ran out of memory in {run['ram_bytes'] >> 20} MiB: {run['oom_victims'][0]}"
        for run in runs
        if run["oom"]
    ]
    for run in (run for run in runs if run["model"] in bounded):
        what, where = f"{run['program']} of {run['model']}", f"in {run['ram_bytes'] >> 20} MiB"
        if run["program"] == "caption" and run["peak_rss_bytes"] > PEAK_BYTES:
            wrong.append(f"{what} peaks at {run['peak_rss_bytes']} bytes, over {PEAK_BYTES}, {where}")
        if run["available_bytes"] < LEFT_BYTES:
            wrong.append(f"{what} leaves {run['available_bytes']} bytes, under {LEFT_BYTES}, {where}")
    return wrong


def format_fit(document: Mapping[str, Any]) -> str:
    """A table of what `measure_fit` found, in MB of 10^6 bytes."""
    lines = [f"{'memory':>8} {'model':<12} {'program':<8} {'peak RSS':>9} {'left':>7}  MB"]
    for run in document["runs"]:
        end = "  OUT OF MEMORY" if run["oom"] else ""
        peak, left = run["peak_rss_bytes"] / 1e6, run["available_bytes"] / 1e6
        lines.append(
            f"{run['ram_bytes'] / (1 << 20):>5.0f} Mi {run['model']:<12} {run['program']:<8} "
            f"{peak:>9.1f} {left:>7.1f}{end}"
        )
    return "\n".join(lines)


def conversation(turns: int) -> str:
    """Lines for `microvlm chat`: a picture, then questions about what is seen and about what is remembered."""
    lines = [f"/image /srv/{PICTURE_THERE}"]
    for number in range(turns - 1):
        question = QUESTIONS[number % 2]
        lines.append(question if question == QUESTIONS[0] else f"/recall {question}")
    return "".join(f"{line}\n" for line in lines[:turns])


def _tasks(subject: Subject, backend: str, ram_mb: int) -> list[tuple[str, str, Command]]:
    where = f"/srv/models/{subject.name}"
    shared = ("--model", where, "--backend", backend, "--max-new-tokens", str(subject.new_tokens))
    caption = Command(("microvlm", "caption", f"/srv/{PICTURE_THERE}", *shared))
    tasks = [(subject.name, "caption", caption)]
    if subject.turns and ram_mb <= subject.chats_up_to_mb:
        chat = Command(
            ("microvlm", "chat", "--memory", f"{subject.name}.mem", *shared),
            conversation(subject.turns),
        )
        tasks.append((subject.name, "chat", chat))
    return tasks


def _row(system: System, outcome: Outcome, what: str) -> dict[str, Any]:
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("Error: ")]
    if not outcome.oom and (outcome.exit_status or errors):
        said = (errors or outcome.stderr.strip().splitlines()[-1:] or ["nothing on stderr"])[0]
        raise UserError(f"{what} failed on the emulated board (exit status {outcome.exit_status}): {said}")
    return {
        "ram_bytes": system.ram_bytes,
        "usable_bytes": outcome.total_bytes,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "available_bytes": outcome.available_bytes,
        "oom": outcome.oom,
        "oom_victims": list(outcome.oom_victims),
        "exit_status": outcome.exit_status,
    }
