"""The file that an episodic memory is kept in: safetensors with JSON metadata, renamed into place. Needs no torch.

Tensors, float32: memory_mean [S, K, C] and memory_cov [S, K, K] of S states, and the rows that are in them, oldest
first: log_keys [N, K], log_codes [N, C]. Metadata: format, fingerprint of the model, log (a JSON list of text, time,
image, memory: the row's state, and where they are known question and picture, a sha256: what the row's key encodes),
forgotten (a JSON list: rows forgotten in each state since it was built), sha256 of it all. Format 1, which is still
read, had one state, without the S, and no `forgotten`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from microvlm.console import describe_os_error
from microvlm.errors import UserError
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.memory.file_lock import file_behind
from microvlm.runtime import MemoryArrays

FORMAT = 2
_TENSORS = ("memory_mean", "memory_cov", "log_keys", "log_codes")
_METADATA = ("format", "fingerprint", "log", "forgotten")


def save_memory(memory: EpisodicMemory, path: str | Path, fingerprint: str) -> None:
    """Replace the file that `path` leads to; a crash or a full disk keeps the old one. Raises UserError.

    The new file has the permissions of the old one, the first what the umask leaves of 0666.
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
    log = json.dumps([_logged(entry) for entry in entries])
    forgotten = json.dumps(memory.forgotten)
    metadata = {"format": str(FORMAT), "fingerprint": fingerprint, "log": log, "forgotten": forgotten}
    _replace(Path(path), save(tensors, {**metadata, "sha256": _digest(tensors, metadata)}))


def load_memory(path: str | Path, fingerprint: str) -> EpisodicMemory:
    """Raises UserError for a missing, damaged or newer file, and for another model's."""
    memory, written_by = read_memory(path)
    if written_by != fingerprint:
        raise UserError(
            f"{path} was written by another model; give the model that wrote it, or another file."
        )
    return memory


def read_memory(path: str | Path) -> tuple[EpisodicMemory, str]:
    """(what is in the file, the fingerprint of the model that it belongs to). Raises UserError as `load_memory`."""
    tensors, metadata = _read(Path(path))
    mean, covariance = tensors["memory_mean"], tensors["memory_cov"]
    if metadata["format"] == "1":
        mean, covariance = mean[None], covariance[None]
    states = [MemoryArrays(mean[i : i + 1], covariance[i : i + 1]) for i in range(len(mean))]
    rows = zip(json.loads(metadata["log"]), tensors["log_keys"], tensors["log_codes"], strict=True)
    entries = [
        Entry(
            e["text"],
            key,
            code,
            e["time"],
            e["image"],
            e.get("memory", 0),
            e.get("question"),
            e.get("picture", ""),
        )
        for e, key, code in rows
    ]
    forgotten = json.loads(metadata.get("forgotten", "[0]"))
    return EpisodicMemory(states, entries, forgotten), metadata["fingerprint"]


def _logged(entry: Entry) -> dict[str, Any]:
    known = {} if entry.question is None else {"question": entry.question, "picture": entry.picture}
    return {"text": entry.text, "time": entry.time, "image": entry.image, "memory": entry.memory, **known}


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    damaged = UserError(f"{path} is damaged or no memory file; use a copy of it, or another file.")
    try:
        # Opened here first, for errors of the file system in their own words.
        with file_behind(path).open("rb"):
            pass
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            written = metadata.get("format", "")
            if not (written.isascii() and written.isdigit() and len(written) < 9):
                raise damaged
            if int(written) > FORMAT:
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
    wanted = {key: metadata[key] for key in _METADATA if key in metadata}
    if _digest(tensors, wanted) != metadata.get("sha256"):
        raise damaged
    return tensors, wanted


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in _TENSORS:
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Written aside, flushed to the disk and renamed, and the rename flushed too."""
    real = file_behind(path)
    aside = real.with_name(f".{real.name}-{secrets.token_hex(4)}")
    try:
        mode = _mode(real)
        # Of an old file nobody reads the content before its permissions are there.
        at_first = 0o666 if mode is None else 0o600
        with open(aside, "xb", opener=lambda name, flags: os.open(name, flags, at_first)) as file:
            if mode is not None:
                os.chmod(aside, mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, real)
        _flush_folder(real.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        error.filename = str(path)
        raise UserError(f"the memory was not saved: {describe_os_error(error)}") from None


def _mode(path: Path) -> int | None:
    """The permissions of the file, None where there is none yet."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None


def _flush_folder(folder: Path) -> None:
    """As far as the system lets a folder be opened and flushed; the file itself is safe already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
