"""The format of a bundle: a folder with ONNX graphs and a manifest, which lists every file with its size and hash.

The exporter writes manifests and the backends read them, both by what this module holds. Imports neither numpy nor
torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from microvlm.errors import UserError
from microvlm.temporary_folder import recover

MANIFEST = "manifest.json"
BUNDLE_FORMAT = 2
"""Since 2, `memory_read` takes the covariance too."""
HASH_BELOW_BYTES = 64_000_000
"""Every file of a smaller bundle is hashed on loading; of a larger one the small files only, unless asked for all."""
SMALL_FILE_BYTES = 4_000_000


class FileEntry(TypedDict):
    """One file of a bundle. The manifest's key is its path relative to the bundle, with `/`."""

    bytes: int
    sha256: str


class TensorEntry(TypedDict):
    """An input or output of a graph. A dimension is a length or the name of a free one."""

    name: str
    dtype: str
    shape: list[int | str]


class GraphEntry(TypedDict):
    """One ONNX file, `file` of the bundle."""

    file: str
    name: str
    method: str
    """The function of `MicroVLM` that the graph holds."""
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]


class Manifest(TypedDict):
    """The document in manifest.json."""

    format: int
    name: str
    fingerprint: str
    """Hash of the model's weights; a memory file belongs to one fingerprint."""
    bits: float
    packing: str
    embedding_bits: int
    bits_per_weight: dict[str, float | None]
    """Bits on disk by group of weights; None for a group without weights."""
    versions: dict[str, Any]
    graphs: dict[str, GraphEntry]
    lowered: dict[str, dict[str, Any]]
    """Lowered layers: `kind`, `rows`, `columns` and what else it takes to build them empty."""
    files: dict[str, FileEntry]
    """Every file but the manifest itself and what was written after it (README.md, example.py)."""
    vocabulary: dict[str, Any] | None
    """Sizes of a vocabulary that was reduced; None for a whole one."""
    training: Any
    """The checkpoint's training.json, None if it had none."""


def is_bundle(directory: str | Path) -> bool:
    """Whether `directory` has a manifest. A bundle's replacement that was cut off is finished first (`recover`)."""
    recover(directory)
    return (Path(directory) / MANIFEST).is_file()


def sha256(path: Path) -> str:
    """The hash of a file's content in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, FileEntry]:
    """An entry for every file below `folder`, by its path with slashes, sorted. Raises OSError."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write FOLDER/manifest.json. Raises OSError."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def open_bundle(directory: str | Path, verify: bool | None = None) -> Manifest:
    """Read the manifest and check the bundle's files: all are there with the right sizes and, with `verify`, hashes.

    `verify` None checks every hash of a bundle below `HASH_BELOW_BYTES`, and those of small files in a larger one.

    Raises UserError naming the file that is wrong.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    files = manifest["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing from the bundle: copy or export it again.")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(
                f"{path} has {size} bytes instead of {entry['bytes']}: copy or export the bundle again."
            )
    verify_all = verify or (
        verify is None and sum(entry["bytes"] for entry in files.values()) < HASH_BELOW_BYTES
    )
    for name, entry in files.items():
        # Graphs, tokenizer and the memory's prior are read whole anyway; only a large bundle's weights are spared.
        hashed = verify_all or (verify is None and entry["bytes"] < SMALL_FILE_BYTES)
        if hashed and sha256(folder / name) != entry["sha256"]:
            raise UserError(
                f"{folder / name} was altered: its hash is not the manifest's; copy or export it again."
            )
    return manifest


def is_intact(directory: str | Path) -> bool:
    """Whether `directory` is a bundle that `open_bundle` accepts."""
    try:
        return is_bundle(directory) and bool(open_bundle(directory))
    except UserError:
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read FOLDER/manifest.json and check its structure, but no file that it lists. Raises UserError."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a bundle, as microvlm-export makes it.")
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: {folder} is not a bundle, or an incomplete one; export it again."
        ) from None
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: copy or export the bundle again.") from None
    try:
        if manifest["format"] > BUNDLE_FORMAT:
            raise UserError(f"{path} was written by a newer microvlm; upgrade the package.")
        if manifest["format"] < BUNDLE_FORMAT:
            raise UserError(f"{path} was written by an older microvlm; export the bundle again.")
        for name, entry in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(name)
            int(entry["bytes"]), str(entry["sha256"])
        for graph in manifest["graphs"].values():
            if graph["file"] not in manifest["files"]:
                raise KeyError(graph["file"])
            [tensor["name"] for tensor in [*graph["inputs"], *graph["outputs"]]]
        for layer in manifest["lowered"].values():
            str(layer["kind"]), int(layer["rows"]), int(layer["columns"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged: copy or export the bundle again.") from None
    return manifest
