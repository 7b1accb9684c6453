"""An episodic memory with its log, and the file it is kept in: safetensors with JSON metadata, renamed into place.

Tensors, float32: memory_mean [K, C], memory_cov [K, K], and the rows that were written, oldest first: log_keys [N, K],
log_codes [N, C]. Metadata: format, fingerprint of the model, log (a JSON list of text, time, image), sha256 of it all.
Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from microvlm.cli_support import describe_os_error
from microvlm.errors import UserError
from microvlm.runtime import MemoryArrays, Runtime

FORMAT = 1
_TENSORS = ("memory_mean", "memory_cov", "log_keys", "log_codes")


@dataclass(frozen=True)
class Entry:
    """One row that was written."""

    text: str
    key: np.ndarray
    """w, float32 [K]."""
    code: np.ndarray
    """z, float32 [C]."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""
    image: bool = False
    """Whether the row is a picture's, found again by its place."""


@dataclass
class EpisodicMemory:
    """A state, batch 1, and what was written into it."""

    state: MemoryArrays
    entries: list[Entry]

    @classmethod
    def empty(cls, runtime: Runtime) -> EpisodicMemory:
        """The prior of the model."""
        return cls(runtime.memory_prior(), [])

    def write(self, runtime: Runtime, entry: Entry) -> None:
        """Write one row into the state and the log."""
        self.state = runtime.memory_write(entry.key[None], entry.code[None], self.state)
        self.entries.append(entry)

    def save(self, path: str | Path, fingerprint: str) -> None:
        """Replace the file at `path`; a crash or a full disk keeps the old one. Raises UserError."""
        if not fingerprint:
            raise UserError("this bundle has no fingerprint, so no memory can belong to it; export it again.")
        slots, width = self.state.mean.shape[1:]
        tensors = {
            "memory_mean": self.state.mean[0],
            "memory_cov": self.state.covariance[0],
            "log_keys": np.stack([e.key for e in self.entries]) if self.entries else np.zeros((0, slots)),
            "log_codes": np.stack([e.code for e in self.entries]) if self.entries else np.zeros((0, width)),
        }
        tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
        log = json.dumps([{"text": e.text, "time": e.time, "image": e.image} for e in self.entries])
        metadata = {"format": str(FORMAT), "fingerprint": fingerprint, "log": log}
        _replace(Path(path), save(tensors, {**metadata, "sha256": _digest(tensors, metadata)}))

    @classmethod
    def load(cls, path: str | Path, fingerprint: str) -> EpisodicMemory:
        """Raises UserError for a missing, damaged or newer file, and for another model's."""
        tensors, metadata = _read(Path(path))
        if metadata["fingerprint"] != fingerprint:
            raise UserError(
                f"{path} was written by another model; give the model that wrote it, or another file."
            )
        state = MemoryArrays(tensors["memory_mean"][None], tensors["memory_cov"][None])
        log = json.loads(metadata["log"])
        rows = zip(log, tensors["log_keys"], tensors["log_codes"], strict=True)
        return cls(state, [Entry(e["text"], key, code, e["time"], e["image"]) for e, key, code in rows])


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    damaged = UserError(f"{path} is damaged or no memory file; use a copy of it, or another file.")
    try:
        # Opened here first, for errors of the file system in their own words.
        with path.open("rb"):
            pass
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            if not metadata.get("format", "").isdigit():
                raise damaged
            if int(metadata["format"]) > FORMAT:
                raise UserError(f"{path} was written by a newer microvlm; upgrade the package.")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; give a memory file, as microvlm chat --memory writes it."
        ) from None
    except OSError as error:
        raise UserError(describe_os_error(error)) from None
    except SafetensorError:
        raise damaged from None
    wanted = {key: metadata.get(key, "") for key in ("format", "fingerprint", "log")}
    if _digest(tensors, wanted) != metadata.get("sha256"):
        raise damaged
    return tensors, metadata


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in _TENSORS:
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    aside = None
    try:
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if aside is not None and os.path.exists(aside):
            os.unlink(aside)
        error.filename = str(path)
        raise UserError(f"the memory was not saved: {describe_os_error(error)}") from None
