"""Where a model's files are: bundles and their manifest checked, a checkpoint exported once into the user's cache.

A bundle is a folder with manifest.json. Needs no torch unless a checkpoint has to be exported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microvlm.console import note
from microvlm.errors import UserError

if TYPE_CHECKING:
    from microvlm.formats.weight_format import WeightFormat

MANIFEST = "manifest.json"
FORMAT = 2
"""Of a bundle: since 2, `memory_read` takes the covariance too."""
HASH_BELOW_BYTES = 64_000_000
"""Bundles smaller than this have every hash checked when loaded; of larger ones only the small files, or on request."""
SMALL_FILE_BYTES = 4_000_000


def is_bundle(directory: str | Path) -> bool:
    return (Path(directory) / MANIFEST).is_file()


def open_bundle(directory: str | Path, verify: bool | None = None) -> dict[str, Any]:
    """The manifest, after every file was found with its size and, with `verify`, its sha256.

    `verify` None means: when the bundle is below 64 MB. Raises UserError naming the file that is wrong.
    """
    folder = Path(directory)
    manifest = _read_manifest(folder)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing from the bundle: copy or export it again.")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise UserError(
                f"{path} has {size} bytes instead of {wanted['bytes']}: copy or export the bundle again."
            )
    every = verify or (verify is None and sum(entry["bytes"] for entry in files.values()) < HASH_BELOW_BYTES)
    for name, wanted in files.items():
        # Graphs, tokenizer and the memory's prior are read whole anyway; only a large bundle's weights are spared.
        hashed = every or (verify is None and wanted["bytes"] < SMALL_FILE_BYTES)
        if hashed and sha256(folder / name) != wanted["sha256"]:
            raise UserError(
                f"{folder / name} was altered: its hash is not the manifest's; copy or export it again."
            )
    return manifest


def resolve_bundle(
    source: str | Path, bits: float = 1.58, packing: str = "2bit", embedding_bits: int = 8
) -> Path:
    """A bundle folder as it is; a checkpoint (directory, hub id or `nano`) exported on first use.

    The cache is $MICROVLM_CACHE, or ~/.cache/microvlm; the key is the hash of the weights, of what exports, and the
    widths.
    Raises UserError, without torch too: then one sentence says where to get a bundle.
    """
    if is_bundle(source):
        return Path(source)
    if not _can_export():
        if Path(source).is_dir():
            raise UserError(f"{source} is no bundle (it has no {MANIFEST}): {_ELSEWHERE}.")
        raise UserError(f"'{source}' has to be exported first: {_ELSEWHERE}.")
    from microvlm.formats.weight_format import WeightFormat
    from microvlm.model.checkpoint import WEIGHTS, resolve_checkpoint

    checkpoint = resolve_checkpoint(source)
    weights = checkpoint / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{checkpoint} is neither a bundle ({MANIFEST}) nor a checkpoint ({WEIGHTS}).")
    widths = f"{bits:g}bit-{packing}-e{embedding_bits}"
    name = f"{checkpoint.name}-{_content_hash(checkpoint)}-{exporter_digest()}-{widths}"
    bundle = cache_directory() / "bundles" / name
    if not _is_intact(bundle):
        _export(checkpoint, bundle, WeightFormat(bits, packing, embedding_bits))
    return bundle


def exporter_digest() -> str:
    """Cache key: the package's version and the source of everything that shapes a bundle."""
    import microvlm

    package = Path(microvlm.__file__).parent
    sources = sorted(package.glob("*.py"))
    for folder in ("exporters", "formats", "inputs", "model"):
        sources += sorted((package / folder).rglob("*.py"))
    digest = hashlib.sha256(microvlm.__version__.encode())
    for path in sources:
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cache_directory() -> Path:
    """$MICROVLM_CACHE, or microvlm below $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("MICROVLM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microvlm"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_ELSEWHERE = (
    "run microvlm-export where torch is installed (pip install 'microvlm[export]') and give its folder here"
)


def _can_export() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "onnx", "onnxscript"))


def _content_hash(checkpoint: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(checkpoint.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + sha256(path).encode())
    return digest.hexdigest()[:12]


def _is_intact(bundle: Path) -> bool:
    """Whether a cached bundle is there and whole; a damaged one is made again."""
    try:
        return is_bundle(bundle) and bool(open_bundle(bundle))
    except UserError:
        return False


def _export(checkpoint: Path, bundle: Path, weights: WeightFormat) -> None:
    from microvlm.exporters.bundle_writer import CheckFailed, export

    bundle.parent.mkdir(parents=True, exist_ok=True)
    note(f"exporting {checkpoint.name} at {weights.bits:g} bits to {bundle}, once")
    try:
        export(checkpoint, bundle, weights, force=True)
    except CheckFailed as failure:
        raise UserError(f"{checkpoint} cannot be exported here ({failure}); try microvlm-export.") from None
    except UserError:
        # Another process may have exported the same bundle meanwhile.
        if not _is_intact(bundle):
            raise


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a bundle, as microvlm-export makes it.")
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: {folder} is no bundle, or half of one; export it again."
        ) from None
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: copy or export the bundle again.") from None
    try:
        if manifest["format"] > FORMAT:
            raise UserError(f"{path} was written by a newer microvlm; upgrade the package.")
        if manifest["format"] < FORMAT:
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
