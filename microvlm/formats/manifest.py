"""The manifest of a bundle, a folder with ONNX graphs: it lists every file with its size and hash.

The exporter writes manifests and the backends read them, both by what this module holds. Imports neither numpy nor
torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count, Sha256, quote
from microvlm.formats.lowered_layer import LoweredLayer

MANIFEST = "manifest.json"
README, EXAMPLE = "README.md", "example.py"
"""Pages for people, which nothing reads."""
MEMORY_PRIOR = "memory_prior"
"""The file of the empty memory's mean, without its ending, and the tensor in it."""
BUNDLE_FORMAT = 2
"""Since 2, `memory_read` takes the covariance too."""
_REMEDY = "copy or export the bundle again"


Word = Annotated[str, Meta(min_length=1, max_length=200)]
Bits = Annotated[int, Meta(ge=1, le=64)] | Annotated[float, Meta(gt=0, le=64)]
Dimension = Annotated[int, Meta(ge=0, le=2**31 - 1)] | Word


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a bundle. The manifest's key is its path relative to the bundle, with `/`."""

    bytes: Count
    sha256: Sha256


class TensorEntry(msgspec.Struct, frozen=True):
    """An input or output of a graph. A dimension is a length or the name of a free one."""

    name: Word
    dtype: Word
    shape: tuple[Dimension, ...]


class GraphEntry(msgspec.Struct, frozen=True):
    """One ONNX file, `file` of the bundle."""

    file: str
    name: Word
    method: Word
    """The function of `MicroVLM` that the graph holds."""
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The document in manifest.json. Keys that this version does not know are skipped."""

    format: int
    name: str = ""
    fingerprint: Annotated[str, Meta(max_length=200)] = ""
    """Hash of the model's weights; a memory file belongs to one fingerprint."""
    bits: Bits | None = None
    packing: Word | None = None
    embedding_bits: Bits | None = None
    lowering: Word = "custom"
    """The operators of the graphs' products, see `weight_format.LOWERINGS`. Weights of others than ours have names and
    layouts that no backend reads back."""
    bits_per_weight: dict[str, float | None] = {}
    """Bits on disk by group of weights; None for a group without weights."""
    versions: dict[str, Any] = {}
    graphs: dict[str, GraphEntry]
    lowered: dict[str, LoweredLayer]
    """Lowered layers by their names in the model."""
    files: dict[str, FileEntry]
    """Every file but the manifest itself. Older bundles do not list README.md and example.py."""
    vocabulary: dict[str, int] | None = None
    """Sizes of a vocabulary that was reduced; None for a whole one."""
    training: dict[str, Any] | None = None
    """The checkpoint's training.json, None if it had none."""

    def __post_init__(self) -> None:
        for name in self.files:
            if not is_safe_name(name):
                raise ValueError(f"{quote(name)} in 'files' is no path of a file inside the bundle")
        for name, graph in self.graphs.items():
            if graph.file not in self.files:
                raise ValueError(f"'files' lacks {quote(graph.file)}, the graph {quote(name)}")
            if not graph.file.endswith(".onnx"):
                # ONNX Runtime reads a file by its name's end, and the others are of formats that are not checked.
                raise ValueError(f"{quote(graph.file)}, the graph {quote(name)}, does not end in .onnx")


class _Format(msgspec.Struct, frozen=True):
    format: int


def is_safe_name(name: str) -> bool:
    """Whether `name` is a relative path with slashes that stays inside its folder on every system."""
    parts = name.split("/")
    return (
        len(name) <= 250
        and name.isprintable()
        and not any(letter in name for letter in '\\:*?"<>|')
        and all(part.strip(" .") for part in parts)
    )


def sha256(path: Path) -> str:
    """The hash of a file's content in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, FileEntry]:
    """An entry for every file below `folder`, by its path with slashes, sorted. Raises OSError."""
    return {
        path.relative_to(folder).as_posix(): FileEntry(path.stat().st_size, sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write FOLDER/manifest.json. Raises OSError."""
    (folder / MANIFEST).write_text(manifest_text(manifest))


def manifest_text(manifest: Manifest) -> str:
    """The document of a manifest. Our own operators are not named: those of bundles have been ours before."""
    document = msgspec.to_builtins(manifest)
    if manifest.lowering == "custom":
        del document["lowering"]
    return json.dumps(document, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read FOLDER/manifest.json and check its structure, but no file that it lists. Raises UserError."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a bundle, as microvlm-export makes it.")
    try:
        content = documents.read_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: {folder} is not a bundle, or an incomplete one; export it again."
        ) from None
    # First of all, because a newer format may have any other structure.
    version = documents.parse(content, _Format, path, _REMEDY).format
    if version > BUNDLE_FORMAT:
        raise UserError(f"{path} was written by a newer microvlm; upgrade the package.")
    if version < BUNDLE_FORMAT:
        raise UserError(f"{path} was written by an older microvlm; export the bundle again.")
    return documents.parse(content, Manifest, path, _REMEDY)
