"""Memories without a model, which build in microseconds: rows with numbered texts, and a runtime that counts writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save_file

from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.memory_file import save_memory
from microvlm.memory.memory_reader import digest_of
from microvlm.runtime import MemoryArrays

PRINT = "0123456789abcdef"
SLOTS, WIDTH = 16, 48


def entries(count: int, first: int = 0) -> list[Entry]:
    """Rows with the texts "fact FIRST" and so on."""
    rng = np.random.default_rng(first)
    keys, latents = rng.normal(size=(count, SLOTS)) / 4, rng.normal(size=(count, WIDTH)) / 7
    rows = zip(keys.astype(np.float32), latents.astype(np.float32), strict=True)
    return [
        Entry(f"fact {first + number}", key, latent, time=1e9 + number, question="who?")
        for number, (key, latent) in enumerate(rows)
    ]


def texts(memory: EpisodicMemory) -> list[str]:
    return [entry.text for entry in memory.entries]


def older_file(memory: EpisodicMemory, path: Path, file_format: int) -> None:
    """Write a file of format 1 or 2."""
    save_memory(memory, path, PRINT)
    tensors = load(path.read_bytes())
    log = [{"text": e.text, "time": e.time, "image": e.image} for e in memory.entries]
    metadata = {"format": str(file_format), "fingerprint": PRINT, "log": json.dumps(log)}
    if file_format == 1:
        tensors |= {name: tensors[name][0] for name in ("memory_mean", "memory_cov")}
    else:
        metadata["forgotten"] = json.dumps(memory.forgotten)
    save_file(tensors, path, metadata | {"sha256": digest_of(tensors, metadata).hex()})


class Stepping:
    """The part of a runtime that a memory uses: the mean is the number of rows in the state."""

    @staticmethod
    def memory_prior() -> MemoryArrays:
        return MemoryArrays(np.zeros((1, SLOTS, WIDTH), np.float32), np.eye(SLOTS, dtype=np.float32)[None])

    @staticmethod
    def memory_write(key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        return MemoryArrays(state.mean + 1, state.covariance)

    @staticmethod
    def memory_forget(key: np.ndarray, latent: np.ndarray, state: MemoryArrays) -> MemoryArrays:
        return MemoryArrays(state.mean - 1, state.covariance)


def counts_agree(memory: EpisodicMemory) -> bool:
    """Whether every state of a `Stepping` runtime has the rows that the log says, and no others."""
    rows = np.bincount([entry.memory for entry in memory.entries], minlength=memory.state_count)
    return all(np.all(state.mean == count) for state, count in zip(memory.states, rows, strict=True))
