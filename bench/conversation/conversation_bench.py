"""`microvlm-bench conversation`: a long conversation with its memory in a file, and what it takes.

Every turn shows one of the evaluation set's pictures with a question of its own and is saved, as `microvlm chat` does.
At each stage a probe asks for the first picture, which only the memory can answer. Linux only: figures are /proc's.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from microvlm.backends import load
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.provenance import describe_model, kernels_of, memory_of_this_process, provenance
from microvlm.bench.speed.harness import Progress
from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.memory.conversation import Chat
from microvlm.memory.episodic import EpisodicMemory, arrays_of
from microvlm.memory.ordinal_questions import ordinal_question
from microvlm.sampling import GenerationOptions

STAGES = 20
WARM_UP_STAGES = 2
"""The stage from which on the process has to stay as it is."""
BAR_GROWTH = 0.10
ANSWER_TOKENS = 8
QUESTIONS = (
    "what is this?",
    "what colour is it?",
    "where is it?",
    "how many are there?",
    "is it a toy?",
    "who owns this?",
    "whose is it?",
)


def run(
    model: str, backend: str, turns: int, threads: int = 1, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """The document of a conversation of `turns` turns. Raises UserError for a model or backend that can't be had."""
    if turns < STAGES or turns % STAGES:
        raise UserError(f"--turns is {turns}; give a multiple of {STAGES}.")
    if not Path("/proc/self/io").exists():
        raise UserError("a conversation is measured by /proc/self/io, which only Linux has; run it there.")
    runtime = load(backend, model, threads)
    processor = Processor.from_pretrained(runtime.directory)
    options = GenerationOptions(max_new_tokens=ANSWER_TOKENS, stop_tokens=processor.stop_tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.mem"
        stages = list(_stages(Chat(runtime, processor, options), path, turns, progress))
        start = time.perf_counter()
        later = Chat(runtime, processor, options)
        later.load(path)
        load_s = time.perf_counter() - start
        reloaded = _probe(later)
    return {
        "report": "conversation",
        "label": f"{runtime.directory.name}-{backend}",
        "backend": backend,
        "turns": turns,
        "slots": runtime.config.memory.slots,
        "stages": stages,
        "load_s": round(load_s, 3),
        "probe_after_loading": reloaded,
        "bars": bars(stages, reloaded),
        "kernels": kernels_of(runtime),
        "provenance": provenance(describe_model(runtime.directory), threads),
    }


def bars(stages: list[dict[str, Any]], reloaded: dict[str, Any]) -> list[dict[str, Any]]:
    """Growth of the process over its facts' own bytes, of descriptors and of bytes a turn, and changed answers."""
    warm = stages[WARM_UP_STAGES - 1 :]
    first = warm[0]
    above = [stage["rss_bytes"] - stage["fact_bytes"] for stage in warm]
    written = [stage["written_bytes_per_turn"] for stage in warm]
    answers = {(stage["probe"]["answer"], stage["probe"]["from_memory"]) for stage in stages}
    answers.add((reloaded["answer"], reloaded["from_memory"]))
    return [
        _bar("growth of RSS above the facts' own bytes", max(above) / above[0] - 1, BAR_GROWTH),
        _bar("growth of open descriptors", max(s["descriptors"] for s in warm) - first["descriptors"], 0),
        _bar("growth of the bytes written a turn", max(written) / written[0] - 1, BAR_GROWTH),
        _bar("other answers of the probe than the first", len(answers) - 1, 0),
    ]


def fact_bytes(memory: EpisodicMemory) -> int:
    """Bytes of what a memory holds: arrays and texts of its rows, and its states."""
    rows = sum(
        sum(array.nbytes for array in arrays_of(entry))
        + sum(len(text.encode()) for text in (entry.text, entry.question or "", entry.picture))
        for entry in memory.entries
    )
    return rows + sum(part.nbytes for state in memory.states for part in state)


def _stages(chat: Chat, path: Path, turns: int, progress: Progress) -> Iterator[dict[str, Any]]:
    """Talk, and measure after every `turns` / STAGES turns."""
    evalset = load_evalset()
    images = [evalset.path(image.file) for image in evalset.images]
    rng = np.random.default_rng(0)
    chat.save(path)
    before = _written_bytes()
    start = time.perf_counter()
    for turn in range(1, turns + 1):
        image = images[(turn - 1) % len(images)]
        question = (
            QUESTIONS[turn % len(QUESTIONS)] if turn > 1 else chat.processor.config.prompt.caption_prompt
        )
        if turn > len(QUESTIONS):
            question = f"{question} {rng.integers(100_000)}"
        chat.ask(question, image, label=image.name)
        chat.save(path)
        if turn % (turns // STAGES):
            continue
        seconds, written = time.perf_counter() - start, _written_bytes() - before
        each = turns // STAGES
        stage: dict[str, Any] = {
            "turns": turn,
            "facts": len(chat.memory.entries),
            "states": chat.memory.state_count,
            "rss_bytes": memory_of_this_process()["rss_bytes"],
            "fact_bytes": fact_bytes(chat.memory),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "file_bytes": path.stat().st_size,
            "written_bytes_per_turn": round(written / each, 1),
            "ms_per_turn": round(1e3 * seconds / each, 2),
            "probe": _probe(chat),
        }
        progress(
            f"{turn} turns: {stage['rss_bytes'] / 1e6:.0f} MB, {stage['written_bytes_per_turn']:.0f} bytes and "
            f"{stage['ms_per_turn']:.0f} ms a turn, '{stage['probe']['answer']}'"
        )
        yield stage
        before, start = _written_bytes(), time.perf_counter()


def _probe(chat: Chat) -> dict[str, Any]:
    """Ask for the first picture. An answer from the memory alone is not written into it."""
    turn = chat.ask(ordinal_question(0))
    return {"answer": turn.answer, "from_memory": turn.from_memory, "scope": round(turn.scope, 6)}


def _written_bytes() -> int:
    """Bytes that this process has passed to write, whatever became of them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def _bar(name: str, value: float, at_most: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "at_most": at_most, "met": value <= at_most}
