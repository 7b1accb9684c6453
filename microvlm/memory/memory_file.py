"""Memory files: an episodic memory as safetensors with JSON metadata. Imports no torch.

Tensors, float32: `memory_mean` [S, K, C] and `memory_cov` [S, K, K] of S states; `log_keys` [N, K] and `log_codes`
[N, C], the keys and latents of the N rows in them, oldest first.

Metadata: `format`; `fingerprint` of the model; `log`, a JSON list with an object a row (`text`, `time`, `image`,
`memory`, which is the row's state, and where known `question` and `picture`, the sha256 of the pixels that the row's
key encodes); `forgotten`, a JSON list of the number of rows forgotten in each state since it was built; `sha256` of
all this. Format 1, which is still read, had one state, no dimension S and no `forgotten`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from microvlm.atomic import real_file, write_file
from microvlm.console import describe_os_error
from microvlm.errors import UserError
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.runtime import MemoryArrays

MEMORY_FORMAT = 2
_TENSORS = ("memory_mean", "memory_cov", "log_keys", "log_codes")
_METADATA = ("format", "fingerprint", "log", "forgotten")


def save_memory(memory: EpisodicMemory, path: str | Path, fingerprint: str) -> None:
    """Replace the memory file at `path` or behind its links atomically. Raises UserError.

    `fingerprint` is the model's, 16 hexadecimal digits. Permissions of an old file stay.
    """
    if not fingerprint:
        raise UserError("this bundle has no fingerprint, so no memory can belong to it; export it again.")
    entries = memory.entries
    slots, width = memory.states[0].mean.shape[1:]
    tensors = {
        "memory_mean": np.concatenate([state.mean for state in memory.states]),
        "memory_cov": np.concatenate([state.covariance for state in memory.states]),
        "log_keys": np.stack([e.key for e in entries]) if entries else np.zeros((0, slots)),
        "log_codes": np.stack([e.latent for e in entries]) if entries else np.zeros((0, width)),
    }
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    log = json.dumps([_log_row(entry) for entry in entries])
    forgotten = json.dumps(memory.forgotten)
    metadata = {"format": str(MEMORY_FORMAT), "fingerprint": fingerprint, "log": log, "forgotten": forgotten}
    content = save(tensors, {**metadata, "sha256": _digest(tensors, metadata)})
    real_file(path)  # refuses a device, which `write_file` would write to
    try:
        write_file(path, content)
    except UserError as error:
        raise UserError(f"the memory was not saved: {error}") from None


def load_memory(path: str | Path, fingerprint: str) -> EpisodicMemory:
    """The memory in a file of the model with `fingerprint`.

    Raises UserError for a missing, damaged or newer file, and for another model's.
    """
    memory, file_fingerprint = read_memory(path)
    if file_fingerprint != fingerprint:
        raise UserError(
            f"{path} was written by another model; give the model that wrote it, or another file."
        )
    return memory


def read_memory(path: str | Path) -> tuple[EpisodicMemory, str]:
    """(the memory in a file, the fingerprint of the model that wrote it).

    Raises UserError for a missing, damaged or newer file.
    """
    tensors, metadata = _read(Path(path))
    mean, covariance = tensors["memory_mean"], tensors["memory_cov"]
    if metadata["format"] == "1":
        mean, covariance = mean[None], covariance[None]
    states = [MemoryArrays(mean[i : i + 1], covariance[i : i + 1]) for i in range(len(mean))]
    rows = zip(json.loads(metadata["log"]), tensors["log_keys"], tensors["log_codes"], strict=True)
    entries = [
        Entry(
            row["text"],
            key,
            latent,
            row["time"],
            row["image"],
            row.get("memory", 0),
            row.get("question"),
            row.get("picture", ""),
        )
        for row, key, latent in rows
    ]
    forgotten = json.loads(metadata.get("forgotten", "[0]"))
    return EpisodicMemory(states, entries, forgotten), metadata["fingerprint"]


def _log_row(entry: Entry) -> dict[str, Any]:
    row = {"text": entry.text, "time": entry.time, "image": entry.image, "memory": entry.memory}
    return row if entry.question is None else {**row, "question": entry.question, "picture": entry.picture}


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a file whose hash is right. Raises UserError."""
    damaged = UserError(f"{path} is damaged or no memory file; use a copy of it, or another file.")
    try:
        # safetensors reports errors of the file system without their numbers, so they have to be met before.
        with real_file(path).open("rb"):
            pass
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            file_format = metadata.get("format", "")
            if not (file_format.isascii() and file_format.isdigit() and len(file_format) < 9):
                raise damaged
            if int(file_format) > MEMORY_FORMAT:
                raise UserError(f"{path} was written by a newer microvlm; upgrade the package.")
            if {*file.keys()} != {*_TENSORS}:
                raise damaged
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; give a memory file, as microvlm chat --memory or memory write makes it."
        ) from None
    except OSError as error:
        raise UserError(describe_os_error(error)) from None
    except SafetensorError:
        raise damaged from None
    hashed = {key: metadata[key] for key in _METADATA if key in metadata}
    if _digest(tensors, hashed) != metadata.get("sha256"):
        raise damaged
    return tensors, hashed


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """One sha256 over names, dtypes, shapes and bytes of the tensors, and the metadata."""
    digest = hashlib.sha256()
    for name in _TENSORS:
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()
