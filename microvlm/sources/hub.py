"""Models of the Hugging Face hub: ids, the local cache, and snapshots with the files that a model needs.

Downloads are huggingface_hub's, which is imported on first use. Pickled weights are downloaded for an assembly only,
and only where a repository has no others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from microvlm.errors import UserError
from microvlm.formats.manifest import MANIFEST
from microvlm.sources.foreign_models import foreign_type

DOCUMENTS = ("*.json",)
"""Fetched first: they say whether a repository holds a bundle."""
CHECKPOINT_FILES = ("*.json", "*.safetensors")
PART_FILES = (*CHECKPOINT_FILES, "*.jinja")
PICKLED_FILES = ("pytorch_model*.bin",)
BUNDLE_FILES = (*CHECKPOINT_FILES, "*.onnx", "*.data", "README.md", "*.py")
"""All that a manifest may list. A bundle's programs are never run here."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form OWNER/NAME."""
    owner_and_name = _ID.fullmatch(text) is not None
    return owner_and_name and not any(part in text for part in ("..", "--")) and not text.endswith((".", "-"))


def is_cached(hub_id: str) -> bool:
    """Whether the hub's cache holds a snapshot of this repository."""
    return _repository(hub_id).joinpath("snapshots").is_dir()


def snapshot(hub_id: str) -> Path:
    """The folder of a repository's files, downloaded or from the hub's cache.

    A repository with a manifest is a bundle, of which all is fetched that a bundle may hold. Raises UserError.
    """
    return _download(hub_id, _files_to_run)


def _files_to_run(folder: Path) -> Sequence[str]:
    """Patterns of the files that running a model takes. One of other makers is refused: its documents say enough."""
    if (folder / MANIFEST).is_file():
        return BUNDLE_FILES
    return CHECKPOINT_FILES if foreign_type(folder) is None else DOCUMENTS


def part_snapshot(hub_id: str) -> Path:
    """The folder of an encoder's or a decoder's files: with pickled weights where there are no safetensors.

    Raises UserError.
    """
    folder = _download(hub_id, lambda _: PART_FILES)
    has_safetensors = any(folder.glob("*.safetensors"))
    return folder if has_safetensors else _download(hub_id, lambda _: (*PART_FILES, *PICKLED_FILES))


def _download(hub_id: str, choose: Callable[[Path], Sequence[str]]) -> Path:
    """The folder with the files of the patterns that `choose` gives for the folder of a repository's documents."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        cached = _cached_snapshot(hub_id)
        if cached is None:
            raise UserError(
                f"loading '{hub_id}' from the hub needs: pip install 'microvlm[export]'."
            ) from None
        return cached
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(DOCUMENTS)))
        return Path(snapshot_download(hub_id, allow_patterns=list(choose(folder))))
    except Exception as error:  # the hub client raises a dozen kinds, all for a failed download
        raise UserError(
            f"there is no folder '{hub_id}', and the hub gave no model of that name "
            f"({type(error).__name__}): check the name and the network."
        ) from None


def _cached_snapshot(hub_id: str) -> Path | None:
    repository = _repository(hub_id)
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    folder = repository / "snapshots" / revision
    return folder if revision and revision == Path(revision).name and folder.is_dir() else None


def _repository(hub_id: str) -> Path:
    """The folder of a repository in the hub's cache, where huggingface_hub's environment variables put it."""
    environment = os.environ
    home = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "huggingface"
    )
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(os.path.expanduser(cache))) / f"models--{hub_id.replace('/', '--')}"
