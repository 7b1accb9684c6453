"""Measures whether a model fits a board: runs `microvlm caption` and a chat with memory on an emulated board with its
memory and no swap, and a visit to `microvlm serve`, and reads the memory that they take from Debian's kernel.

Peaks and the OOM killer are evidence about a real board; times are not, and are not reported. Nothing else runs on the
emulated board: memory for a board's own services has to come out of `available_bytes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microvlm.backends.emulation import runtime_requirements
from microvlm.bench.pi.board import serve_visit
from microvlm.bench.pi.board.emulated_board import EmulatedBoard, open_emulated_board
from microvlm.bench.pi.board.guest_program import CommandOutcome, GuestCommand
from microvlm.bench.pi.counting.emulated_package import Package
from microvlm.errors import UserError

RAM_MB = (512, 448)
"""MiB of a Pi Zero 2 W: all, and without the 64 MB of the graphics processor."""
TURNS = 10
QUESTIONS = ("what is on the left?", "what was in the first image?")
PROGRAMS = ("caption", "chat", SERVE := "serve")
VISIT = "serve_visit.py"
PICTURE_NAME = "picture"
"""A PNG or a JPEG: the content tells."""
FULL_TURNS = 4
"""Turns of a full-size chat: a picture, a question, a recall, a question. A turn takes a minute on two cores."""
NANO_TOKENS, FULL_TOKENS = 8, 3
"""Most tokens of an answer. An emulated full-size model takes seconds a token; memory peaks at the first."""
PEAK_BYTES, LEFT_BYTES = 250_000_000, 150_000_000
"""Bounds of a full-size model: the largest resident set of a caption, and the memory that every program has to leave to
others. A chat also has the memory's graphs and states."""
TIMEOUT_S = 3600
"""Limit for one machine; a full-size model takes minutes, and longer on busy cores."""


@dataclass(frozen=True)
class FittedModel:
    """A model whose memory is measured, and how long its answers and its chat are."""

    name: str
    bundle: Path
    new_tokens: int = NANO_TOKENS
    """Most tokens of an answer."""
    turns: int = TURNS
    """Turns of the chat; 0 for no chat."""
    chats_up_to_mb: int = max(RAM_MB)
    """The largest machine in which it chats; in larger ones it only captions."""
    serves_up_to_mb: int = min(RAM_MB)
    """The largest machine in which it is served, and a visitor asks it; 0 for none."""
    bounded: bool = False
    """Do PEAK_BYTES and LEFT_BYTES apply?"""


def full_size_model(name: str, bundle: Path) -> FittedModel:
    """A full-size bundle: short answers, few turns, only where memory is tightest, with the bounds."""
    return FittedModel(
        name, bundle, FULL_TOKENS, FULL_TURNS, chats_up_to_mb=min(RAM_MB), serves_up_to_mb=0, bounded=True
    )


def measure_fit(
    models: Sequence[FittedModel],
    picture: Path,
    package: Package,
    ram_mb: Sequence[int] = RAM_MB,
    backend: str = "ort",
    timeout_s: float = TIMEOUT_S,
    programs: Sequence[str] = PROGRAMS,
) -> dict[str, Any]:
    """Start one machine for each size of memory and run every model's programs in it, one after another.

    Returns `ram_bytes`, `peak_rss_bytes`, `available_bytes` (the least MemAvailable) and `oom` of the tightest run, and
    all `runs`. Raises UserError for a program that fails for another reason than memory.
    """
    return summarise(
        [
            run
            for size in ram_mb
            for run in run_programs(models, picture, package, size, backend, timeout_s, programs)
        ]
    )


def run_programs(
    models: Sequence[FittedModel],
    picture: Path,
    package: Package,
    ram_mb: int,
    backend: str = "ort",
    timeout_s: float = TIMEOUT_S,
    programs: Sequence[str] = PROGRAMS,
) -> list[dict[str, Any]]:
    """The runs of one machine with `ram_mb` MiB; none, and no machine, where no program is for that size."""
    tasks = [task for model in models for task in _tasks(model, backend, ram_mb) if task[1] in programs]
    if not tasks:
        return []
    board = open_model_board(ram_mb, {model.name: model.bundle for model in models}, picture, package)
    outcomes = board.run([command for _, _, command in tasks], timeout_s)
    runs = []
    for (name, program, _), outcome in zip(tasks, outcomes, strict=True):
        row = _row(board, outcome, f"{program} of {name}")
        if program == SERVE and not outcome.oom:
            row |= served(outcome.stdout)
        runs.append({"model": name, "program": program, **row})
    return runs


def open_model_board(
    ram_mb: int, bundles: Mapping[str, Path], picture: Path, package: Package, cores: int = 4
) -> EmulatedBoard:
    """A board with `bundles` in /srv/models, the picture, the visitor of a server, and this package with its extra
    `serve` in its Python. Raises UserError."""
    files: dict[str, Path | str] = {f"models/{name}": bundle for name, bundle in bundles.items()}
    files[PICTURE_NAME] = picture
    files[VISIT] = Path(serve_visit.__file__).read_text()
    return open_emulated_board(
        ram_mb,
        cores,
        requirements=runtime_requirements("serve"),
        packages=package.contents,
        files=files,
    )


def served(stdout: str) -> dict[str, Any]:
    """Of the visitor's document: `peak_rss_bytes` of both processes together, their `memory`, and the `answers`.

    The peaks of the two are added, whenever each was, so the sum is an upper bound; pages that both map count twice.
    Raises UserError where the fact was not recalled.
    """
    document = json.loads(stdout.strip().splitlines()[-1])
    memory, answers = document["memory"], document["answers"]
    recall = answers[-1]
    if (recall["answer"], recall["source"]) != (serve_visit.FACT, "memory"):
        raise UserError(f"the server on the emulated board did not recall the fact: it answered {recall}.")
    peak = sum(memory[name]["peak_rss_bytes"] for name in ("server", "worker"))
    return {"peak_rss_bytes": peak, "memory": memory, "answers": answers}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tightest run's four figures (an OOM first, then what left the least memory), and all runs."""
    tightest = min(runs, key=lambda run: (not run["oom"], run["available_bytes"]))
    keys = ("ram_bytes", "peak_rss_bytes", "available_bytes", "oom")
    return {**{key: tightest[key] for key in keys}, "runs": [dict(run) for run in runs]}


def complaints(models: Sequence[FittedModel], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each run that does not fit."""
    bounded = {model.name for model in models if model.bounded}
    sentences = [
        f"{run['program']} of {run['model']} ran out of memory in {run['ram_bytes'] >> 20} MiB: {run['oom_victims'][0]}"
        for run in runs
        if run["oom"]
    ]
    for run in (run for run in runs if run["model"] in bounded):
        description, board_size = f"{run['program']} of {run['model']}", f"in {run['ram_bytes'] >> 20} MiB"
        if run["program"] == "caption" and run["peak_rss_bytes"] > PEAK_BYTES:
            sentences.append(
                f"{description} peaks at {run['peak_rss_bytes']} bytes, over {PEAK_BYTES}, {board_size}"
            )
        if run["available_bytes"] < LEFT_BYTES:
            sentences.append(
                f"{description} leaves {run['available_bytes']} bytes, under {LEFT_BYTES}, {board_size}"
            )
    return sentences


def conversation(turns: int) -> str:
    """Input lines for `microvlm chat`: a picture, then questions about it and about the memory."""
    lines = [f"/image /srv/{PICTURE_NAME}"]
    for number in range(turns - 1):
        question = QUESTIONS[number % 2]
        lines.append(question if question == QUESTIONS[0] else f"/recall {question}")
    return "".join(f"{line}\n" for line in lines[:turns])


def _tasks(model: FittedModel, backend: str, ram_mb: int) -> list[tuple[str, str, GuestCommand]]:
    where = f"/srv/models/{model.name}"
    shared = ("--model", where, "--backend", backend, "--max-new-tokens", str(model.new_tokens))
    caption = GuestCommand(("microvlm", "caption", f"/srv/{PICTURE_NAME}", *shared))
    tasks = [(model.name, "caption", caption)]
    if model.turns and ram_mb <= model.chats_up_to_mb:
        chat = GuestCommand(
            ("microvlm", "chat", "--memory", f"{model.name}.mem", *shared),
            conversation(model.turns),
        )
        tasks.append((model.name, "chat", chat))
    if ram_mb <= model.serves_up_to_mb:
        visitor = ("python3", f"/srv/{VISIT}", where, f"/srv/{PICTURE_NAME}")
        tasks.append((model.name, SERVE, GuestCommand(visitor)))
    return tasks


def _row(board: EmulatedBoard, outcome: CommandOutcome, what: str) -> dict[str, Any]:
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("Error: ")]
    if not outcome.oom and (outcome.exit_status or errors):
        reason = (errors or outcome.stderr.strip().splitlines()[-1:] or ["nothing on stderr"])[0]
        raise UserError(f"{what} failed on the emulated board (exit status {outcome.exit_status}): {reason}")
    return {
        "ram_bytes": board.ram_bytes,
        "usable_bytes": outcome.total_bytes,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "available_bytes": outcome.available_bytes,
        "oom": outcome.oom,
        "oom_victims": list(outcome.oom_victims),
        "exit_status": outcome.exit_status,
    }
