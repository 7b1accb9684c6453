"""Find a model's bundle: a bundle folder is taken as it is, a checkpoint is exported once into the user's cache.

Imports no torch unless a checkpoint has to be exported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from microvlm.console import note
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats.bundle import is_intact
from microvlm.formats.manifest import sha256
from microvlm.sources.cache_directory import cache_directory, writable_cache
from microvlm.sources.model_source import find_model
from microvlm.temporary_folder import label, remove_leftovers

if TYPE_CHECKING:
    from microvlm.formats.weight_format import WeightFormat

BUNDLES = "bundles"
EXPORTING = ("torch", "onnx", "onnxscript")
"""Packages that an export needs, and that shape its graphs."""
"""The folder of exported bundles below the cache."""
_EXPORT_ELSEWHERE = (
    "run microvlm-export where torch is installed (pip install 'microvlm[export]') and give its folder here"
)


def resolve_bundle(
    source: str | Path, bits: float = 1.58, packing: str = "2bit", embedding_bits: int = 8
) -> Path:
    """The folder of a bundle, or of the bundle made on first use from a checkpoint (`find_model` says which is meant).

    Exported bundles are cached below `cache_directory`; the key is the hash of the checkpoint, of the exporter's source
    and the weight format.

    Raises UserError; where torch is not installed it says where to get a bundle.
    """
    model = find_model(source)
    checkpoint = model.folder
    if model.kind == "bundle":
        return checkpoint
    if not _can_export():
        raise UserError(
            f"{printable(str(checkpoint))} is a checkpoint, to be exported first: {_EXPORT_ELSEWHERE}."
        )
    from microvlm.formats.weight_format import WeightFormat

    bundle = cached_bundle(checkpoint, bits, packing, embedding_bits)
    # Also of exports that were killed after they had replaced the bundle, and of other versions, whose names differ.
    remove_leftovers(bundle.parent)
    if not is_intact(bundle):
        _export(checkpoint, bundle, WeightFormat(bits, packing, embedding_bits))
    return bundle


def cached_bundle(
    checkpoint: Path, bits: float = 1.58, packing: str = "2bit", embedding_bits: int = 8
) -> Path:
    """Where in the cache a checkpoint's bundle is looked for and exported to; it need not be there."""
    widths = f"{bits:g}bit-{packing}-e{embedding_bits}"
    name = f"{label(checkpoint.resolve().name)}-{_content_hash(checkpoint)}-{exporter_digest()}-{widths}"
    return cache_directory() / BUNDLES / name


def exporter_digest() -> str:
    """Cache key: the source and the versions of everything that shapes a bundle."""
    import microvlm

    package = Path(microvlm.__file__).parent
    sources = sorted(package.glob("*.py"))
    for folder in ("configuration", "exporters", "formats", "inputs", "model", "sizes"):
        sources += sorted((package / folder).rglob("*.py"))
    digest = hashlib.sha256(microvlm.__version__.encode())
    for name in EXPORTING:
        # A device that only runs bundles has none of them.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    for path in sources:
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _can_export() -> bool:
    return all(importlib.util.find_spec(name) for name in EXPORTING)


def _content_hash(checkpoint: Path) -> str:
    """The first 12 hexadecimal digits of one hash over the names and contents of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + sha256(path).encode())
    return digest.hexdigest()[:12]


def _export(checkpoint: Path, bundle: Path, weights: WeightFormat) -> None:
    writable_cache(BUNDLES)
    from microvlm.exporters.bundle_writer import CheckFailed, export

    note(f"exporting {printable(checkpoint.name)} at {weights.bits:g} bits to {bundle}, once")
    try:
        export(checkpoint, bundle, weights, force=True)
    except CheckFailed as failure:
        raise UserError(f"{checkpoint} cannot be exported here ({failure}); try microvlm-export.") from None
    except UserError:
        # Another process may have exported the same bundle meanwhile.
        if not is_intact(bundle):
            raise
