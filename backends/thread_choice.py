"""`--threads auto`: the number of threads that answers fastest, found by timing answers of the loaded model.

More threads are not always faster: small products wait longer for a second thread than they take, two processors may
share one core, and cores may share a memory bus that one of them fills. So every number up to the usable processors
(`threads.usable_cores`: affinity and container quotas) is timed, up and then down again, so that a machine that gets
busier or hotter meanwhile harms none of them alone. The choice is kept in the user's cache, by model and machine.

Imports neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, to_builtins

import microvlm
from microvlm.atomic import write_file
from microvlm.backends.arm64.device.machine_facts import describe, installed_version
from microvlm.backends.base import Backend, LoadedRuntime, usable_backend
from microvlm.backends.threads import AUTO, pool_threads
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats.documents import load as load_document
from microvlm.formats.manifest import MANIFEST
from microvlm.generation import GenerationOptions, Prompt, Timings, generate
from microvlm.runtime import ChangesThreads, ReportsKernels, ReportsThreads, RunsElsewhere, Runtime
from microvlm.sources.cache_directory import cache_directory, writable_cache
from microvlm.sources.model_source import find_model

CHOICES = "threads"
"""The folder of choices below the cache."""
PROMPT_TOKENS, ANSWER_TOKENS = 32, 16
TIE = 0.03
"""A number of threads must be faster than fewer threads by this share to be worth its heat."""
_EVERY_NUMBER_TO = 8
_LEAST_ANSWERS, _MOST_ANSWERS, _VISIT_S = 2, 16, 0.2
_HOPELESS = 2.0
_MACHINE = ("machine", "cpu", "board", "cores", "memory_bytes", "c_library", "onnxruntime")
_MOST_BYTES = 100_000


class ThreadTrial(Struct, frozen=True):
    """The quickest answer with so many threads, in milliseconds."""

    threads: int
    vision_ms: float
    """One picture."""
    prefill_ms: float
    """A prompt of at most PROMPT_TOKENS tokens, and the answer's first token."""
    decode_ms: float
    """The rest of an answer of at most ANSWER_TOKENS tokens."""

    @property
    def answer_ms(self) -> float:
        return self.vision_ms + self.prefill_ms + self.decode_ms


class ThreadChoice(Struct, frozen=True):
    """What was measured, and what follows; a file of the cache."""

    threads: int
    trials: list[ThreadTrial]
    measured: str


def candidates(most: int) -> list[int]:
    """Numbers of threads from 1 to `most` to time: every one to 8, then 3 of each doubling, and `most`."""
    numbers = set(range(1, min(most, _EVERY_NUMBER_TO) + 1))
    doubling = _EVERY_NUMBER_TO
    while doubling < most:
        numbers |= {
            number for number in (doubling * 5 // 4, doubling * 3 // 2, doubling * 2) if number < most
        }
        doubling *= 2
    return sorted(numbers | {most})


def choose(trials: Sequence[ThreadTrial]) -> int:
    """The fewest threads whose answer takes no longer than TIE above the fastest one's."""
    fastest = min(trial.answer_ms for trial in trials)
    return min(trial.threads for trial in trials if trial.answer_ms <= fastest * (1 + TIE))


def measure(runtime_with: Callable[[int], Runtime], numbers: Sequence[int]) -> list[ThreadTrial]:
    """Time answers with every one of `numbers` threads, up and down, one runtime at a time. Raises UserError.

    The quickest answer counts: the choice is kept, and what other programs take at the moment is not the machine's. A
    number that is hopeless on the way up is not looked at again.
    """
    quickest: dict[int, ThreadTrial] = {}
    for number in (*numbers, *reversed(numbers)):
        limit = _HOPELESS * min((trial.answer_ms for trial in quickest.values()), default=math.inf)
        if number in quickest and quickest[number].answer_ms > limit:
            continue
        trials = _timed_answers(runtime_with(number), number, limit)
        if number in quickest:
            trials.append(quickest[number])
        quickest[number] = min(trials, key=lambda trial: trial.answer_ms)
    return [quickest[number] for number in numbers]


def load_fastest(backend: Backend, folder: Path, **options: Any) -> LoadedRuntime:
    """Load a model with the number of threads that answers fastest here. Raises UserError as `Backend.load` does.

    Measures, which takes seconds, where the cache has no choice of this model, backend and machine, and notes it.
    """
    runtime = backend.load(folder, None, **options)
    if isinstance(runtime, RunsElsewhere) and runtime.target.startswith("emulated"):
        raise UserError(
            f"--threads {AUTO} measures, and times on {runtime.target} say nothing of a real machine; give a number."
        )
    most = (
        runtime.threads
        if isinstance(runtime, RunsElsewhere) and isinstance(runtime, ReportsThreads)
        else None
    )
    numbers = candidates(pool_threads(None) if most is None else most)
    path = _choice_path(backend, runtime, numbers[-1])
    runtime_with = _opener(backend, folder, options, runtime)
    if len(numbers) == 1:
        note(f"--threads {AUTO}: 1, as no more are usable here")
        return runtime_with(1)
    choice = _saved(path, numbers)
    if choice is None:
        note(
            f"--threads {AUTO}: timing answers with 1 to {numbers[-1]} threads, once for this model and machine"
        )
        trials = measure(runtime_with, numbers)
        choice = ThreadChoice(choose(trials), trials, datetime.now(UTC).isoformat(timespec="seconds"))
        _save(path, choice)
    note(f"{_sentence(choice)}; measured {choice.measured}")
    return runtime_with(choice.threads)


def number_of(source: str | os.PathLike[str], backend: str) -> int:
    """The number of threads that a model answers fastest with, on a backend that tells it. Raises UserError."""
    runtime = load_fastest(usable_backend(backend), find_model(source).folder)
    if isinstance(runtime, ReportsThreads):
        return runtime.threads
    raise UserError(f"backend '{backend}' does not tell its threads: give --threads a number.")


def _opener(
    backend: Backend, folder: Path, options: dict[str, Any], runtime: LoadedRuntime
) -> Callable[[int], LoadedRuntime]:
    """A function from a number of threads to `runtime`'s model with so many."""
    if isinstance(runtime, ChangesThreads):
        return runtime.with_threads
    return lambda threads: backend.load(folder, threads, **options)


def _timed_answers(runtime: Runtime, threads: int, limit_ms: float) -> list[ThreadTrial]:
    """Times of answers about one picture, after a short one that opens files; one alone if it takes over `limit_ms`."""
    side, text = runtime.config.vision.image_size, runtime.config.text
    places = text.max_position_embeddings - 1
    prompt_tokens = max(1, min(PROMPT_TOKENS, places // 2))
    answer_tokens = max(1, min(ANSWER_TOKENS, places - prompt_tokens))
    pixels = np.linspace(-1, 1, 3 * side * side, dtype=np.float32).reshape(1, 3, side, side)
    ids = np.arange(prompt_tokens, dtype=np.int64)[None] * 7 % text.vocab_size

    def answer(tokens: int) -> ThreadTrial:
        timings = Timings()
        with timings.phase("vision"):
            runtime.encode_image(pixels)
        prompt = Prompt(runtime.embed_tokens(ids), np.ones_like(ids))
        generate(runtime, prompt, GenerationOptions(tokens, stop_tokens=()), timings=timings)
        return ThreadTrial(
            threads, *(round(timings.milliseconds[part], 3) for part in ("vision", "prefill", "decode"))
        )

    answer(1)
    begin = time.perf_counter()
    trials = [answer(answer_tokens)]
    while trials[0].answer_ms <= limit_ms and (
        len(trials) < _LEAST_ANSWERS
        or (len(trials) < _MOST_ANSWERS and time.perf_counter() - begin < _VISIT_S)
    ):
        trials.append(answer(answer_tokens))
    return trials


def _choice_path(backend: Backend, runtime: LoadedRuntime, most: int) -> Path | None:
    """Where the choice of a model, a backend and a machine is kept; None where there is no cache."""
    manifest = runtime.directory / MANIFEST
    facts = runtime.device if isinstance(runtime, RunsElsewhere) else describe()
    key = {
        "model": runtime.fingerprint,
        "bundle": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else "",
        "backend": backend.name,
        "kernels": runtime.kernels if isinstance(runtime, ReportsKernels) else "",
        "most": most,
        "machine": {name: facts.get(name) for name in _MACHINE},
        "versions": [microvlm.__version__, *map(installed_version, ("onnxruntime", "torch"))],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    try:
        return cache_directory() / CHOICES / f"{digest[:24]}.json"
    except UserError:
        return None


def _saved(path: Path | None, numbers: list[int]) -> ThreadChoice | None:
    """The choice in a file of the cache; None without one, and for one that is damaged."""
    try:
        choice = None if path is None else load_document(path, ThreadChoice, "remove it", _MOST_BYTES)
    except (FileNotFoundError, UserError):
        return None
    return choice if choice is not None and choice.threads in numbers else None


def _save(path: Path | None, choice: ThreadChoice) -> None:
    try:
        if path is None:
            cache_directory()  # whose sentence says why there is none
            return
        writable_cache(CHOICES)
        write_file(path, json.dumps(to_builtins(choice), indent=1) + "\n")
    except UserError as error:
        note(f"it is measured again next time: {error}")


def _sentence(choice: ThreadChoice) -> str:
    return printable(f"--threads {AUTO}: {choice.threads}: {', '.join(_times(choice.trials))}")


def _times(trials: Sequence[ThreadTrial]) -> Iterator[str]:
    for trial in trials:
        yield (
            f"an answer with {trial.threads} takes {trial.answer_ms:.1f} ms (picture {trial.vision_ms:.1f}, prompt "
            f"{trial.prefill_ms:.1f}, tokens {trial.decode_ms:.1f})"
        )
