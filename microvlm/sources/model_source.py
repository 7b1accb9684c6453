"""Where a model comes from: the one decision of every command, backend and function that takes a model.

- A text that is a bundled name (such as `photo`) means the bundled model, whatever lies in the working directory.
- Any other path of a folder means that folder: `./photo`, `photo/` and a Path object are always paths.
- `owner/name`, where no such folder exists, is a model of the Hugging Face hub.

A folder with a manifest is a bundle, another one with weights a checkpoint. What else could have been meant is said
once on stderr.
"""

from __future__ import annotations

import difflib
import errno
import itertools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

from microvlm.atomic_folder import INCOMPLETE
from microvlm.config import CONFIG
from microvlm.console import describe_os_error, note
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats.manifest import MANIFEST
from microvlm.sources import hub
from microvlm.sources.foreign_models import describe_foreign, describe_gguf, foreign_type
from microvlm.temporary_folder import recover

BUNDLED = ("photo", "nano")
"""Names of the models that the package brings, each a folder of `checkpoints`; the default first."""
DEFAULT_MODEL = "photo"
"""What every command and function takes where no model is given."""
BUNDLED_HELP = f"Bundled models: {', '.join(BUNDLED)}. Where none is given: {DEFAULT_MODEL}."
"""The last lines of a command's help."""
_BUNDLED_FOLDER = Path(__file__).parents[1] / "checkpoints"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Lists the files of weights in a checkpoint of other makers that has several."""
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""Weights of other makers that are assembled into a checkpoint, and never run as they are."""
Kind: TypeAlias = Literal["bundle", "checkpoint"]
_CHOICES = (
    "give the folder of a checkpoint or a bundle, a hub id (owner/name) "
    f"or the name of a bundled model ({', '.join(BUNDLED)})"
)
_NEAR_NAMES = 3
_COMPARED_NAMES = 10_000
"""Names of a folder that are compared with one that is missing."""
_LONGEST_NAME = 200
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z")


@dataclass(frozen=True)
class ModelSource:
    """The bundle or checkpoint that a text or a path means."""

    given: str
    """What the user gave."""
    kind: Kind
    folder: Path
    remark: str | None = None
    """What else could have been meant, in a sentence; None if nothing."""


def find_model(source: str | os.PathLike[str], kind: Kind | None = None) -> ModelSource:
    """The model that `source` means: a bundle or a checkpoint, or only the one where `kind` says so.

    A remark is printed on stderr, once. Raises UserError for anything that is not a model of that kind.
    """
    given, folder, remark = _find(source)
    try:
        if (folder / INCOMPLETE).exists():
            raise UserError(f"{_shown(folder)} was only partly replaced: save it again.")
        has_manifest = (folder / MANIFEST).is_file()
        has_weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
        foreign = None if has_manifest else foreign_type(folder)
    except OSError as error:
        raise UserError(describe_os_error(error)) from None
    if foreign is not None:
        raise UserError(describe_foreign(folder, foreign))
    if not has_manifest and not has_weights:
        raise UserError(_describe_what_is_missing(folder))
    if has_manifest and has_weights:
        if kind is None:
            remark = f"{_shown(folder)} holds a bundle and a checkpoint; the bundle is taken."
            _tell(remark)
        return ModelSource(given, kind or "bundle", folder, remark)
    found: Kind = "bundle" if has_manifest else "checkpoint"
    if kind not in (None, found):
        raise UserError(_describe_other_kind(folder, found))
    return ModelSource(given, found, folder, remark)


def find_folder(source: str | os.PathLike[str]) -> Path:
    """The folder that `source` means, whatever is in it. Raises UserError, and prints a remark once, on stderr."""
    return _find(source)[1]


def find_documents(source: str | os.PathLike[str]) -> Path:
    """The folder that `source` means, as `find_folder`; of a model of other makers on the hub, its documents alone."""
    return _find(source, hub.snapshot)[1]


def find_part_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of an encoder or a decoder to assemble: as `find_folder`, but of the hub also pickled weights."""
    return _find(source, hub.part_snapshot)[1]


def _find(
    source: str | os.PathLike[str], snapshot: Callable[[str], Path] = hub.snapshot
) -> tuple[str, Path, str | None]:
    """The text that was given, the folder, and a remark, which was printed."""
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise UserError(f"source= is {source!r:.60}; give a folder or a name, as text or as a path.")
    text = os.fspath(source)
    is_text = isinstance(source, str)
    if is_text and text in BUNDLED:
        return text, _BUNDLED_FOLDER / text, warn_of_folder(text)
    if not text or "\0" in text:
        raise UserError(f"{_quoted(text)} is not the name of a model: {_CHOICES}.")
    recover(text)
    mode = _mode(text)
    if mode is not None and not stat.S_ISDIR(mode):
        raise UserError(_describe_file(Path(text)))
    remark = None
    if mode is None:
        if not is_text or not hub.is_hub_id(text):
            raise UserError(_describe_absence(text, is_text))
        folder = _from_hub(text, snapshot)
        if os.path.isdir(os.path.dirname(text)):
            remark = f"'{text}' is the hub's model of that name; there is no such folder here."
    else:
        # Written as before, unless that would be read as the bundled model where it is given on as text.
        folder = Path(os.path.abspath(text)) if str(Path(text)) in BUNDLED else Path(text)
        if is_text and hub.is_hub_id(text) and hub.is_cached(text):
            remark = (
                f"'{text}' is the folder here; to run the hub's model of that name, work in another folder."
            )
    if remark is not None:
        _tell(remark)
    return text, folder, remark


def warn_of_folder(name: str) -> str | None:
    """Say on stderr, once, that a model's name is not taken for the folder of that name here -> the remark, if any.

    Only a folder that looks like a model could have been meant: `photo` is also what people call a folder of pictures.
    """
    if not any(os.path.isfile(os.path.join(name, file)) for file in (CONFIG, MANIFEST, WEIGHTS, INDEX)):
        return None
    remark = f"'{name}' is the model of that name, not the folder here; give ./{name} for the folder."
    _tell(remark)
    return remark


@cache
def _tell(remark: str) -> None:
    note(remark)


def _from_hub(hub_id: str, snapshot: Callable[[str], Path]) -> Path:
    try:
        return snapshot(hub_id)
    except UserError as error:
        near = _near_names(hub_id)
        raise UserError(f"{str(error).rstrip('.')}; {near}." if near else str(error)) from None


def _mode(text: str) -> int | None:
    """The file mode of a path, None where there is nothing. Raises UserError for a path that cannot be looked at."""
    try:
        return os.stat(text).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL):
            return None
        raise UserError(describe_os_error(error)) from None


def _describe_absence(text: str, is_text: bool) -> str:
    if not is_text and text in BUNDLED:
        return f"there is no folder '{text}'; give the bundled model as text, not as a path."
    near = _near_names(text)
    return f"there is no model {_quoted(text)}{f' ({near})' if near else ''}: {_CHOICES}."


def _near_names(text: str) -> str:
    """Names that were perhaps meant, as `near it: ...`, or nothing."""
    parent, name = os.path.split(text.rstrip("/"))
    try:
        with os.scandir(parent or ".") as entries:
            names = [entry.name for entry in itertools.islice(entries, _COMPARED_NAMES) if entry.is_dir()]
    except (OSError, ValueError):
        names = []
    name = name[:_LONGEST_NAME]
    near = [os.path.join(parent, each) for each in difflib.get_close_matches(name, names, _NEAR_NAMES)]
    if not parent:
        near = [*difflib.get_close_matches(name, BUNDLED), *near]
    return f"near it: {', '.join(map(_quoted, near[:_NEAR_NAMES]))}" if near else ""


def _describe_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return describe_gguf(path)
    for folder in (path.parent, path.parent.parent):
        if _is_model(folder):
            return f"{_shown(path)} is one file of a model: give its folder, {_shown(folder)}."
    if suffix in _ARCHIVES:
        return f"{_shown(path)} is an archive: unpack it and give the folder."
    return f"{_shown(path)} is no folder: {_CHOICES}."


def _describe_what_is_missing(path: Path) -> str:
    has_config = (path / CONFIG).is_file()
    if has_config and (path / "onnx").is_dir():
        return f"{_shown(path)} is an incomplete bundle ({MANIFEST} is missing): copy or export it again."
    if has_config:
        return f"{_shown(path)} is an incomplete checkpoint ({WEIGHTS} is missing): copy it again."
    if (path / "dataset.json").is_file():
        return f"{_shown(path)} is a data folder: train a model on it with microvlm-train test --data {_shown(path)}."
    if (path / "recipe.json").is_file() and not _is_model(path / "checkpoint"):
        return f"{_shown(path)} is a run without a checkpoint: microvlm-train watch {_shown(path)} shows where it is."
    inner = _models_in(path)
    hint = f"give {' or '.join(inner)}" if inner else _CHOICES
    return f"{_shown(path)} is neither a bundle ({MANIFEST}) nor a checkpoint ({WEIGHTS}): {hint}."


def _models_in(path: Path) -> list[str]:
    try:
        folders = sorted(entry for entry in path.iterdir() if _is_model(entry))
    except OSError:
        return []
    return [_shown(folder) for folder in folders[:_NEAR_NAMES]]


def _is_model(folder: Path) -> bool:
    paths = (folder / CONFIG, folder / MANIFEST, folder / WEIGHTS)
    has_config, has_manifest, has_weights = map(os.path.isfile, paths)
    return has_config and (has_manifest or has_weights)


def _describe_other_kind(path: Path, found: Kind) -> str:
    if found == "bundle":
        return f"{_shown(path)} is an exported bundle, and this needs the checkpoint it was made from: give that."
    return f"{_shown(path)} is a checkpoint, and this needs a bundle: make one with microvlm-export."


def _shown(path: Path) -> str:
    """A path that exists, on one line."""
    return printable(str(path))


def _quoted(text: str) -> str:
    """What may be no path at all, on one line; a long one is shortened."""
    name = printable(text)
    return f"'{name}'" if len(name) <= _LONGEST_NAME else f"'{name[:_LONGEST_NAME]}…'"
