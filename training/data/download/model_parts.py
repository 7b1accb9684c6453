"""The public encoders and decoders that MicroVLM is assembled from: where they are, what is needed of them, and checks.

A part's folder is written once. Its revision and the SHA-256 of every file are recorded in SOURCES.json beside it, and
every later run compares the files with that record: a part without a known revision is pinned at first use.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from microvlm.atomic import os_errors_about, write_file
from microvlm.config import CONFIG
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count, Sha256
from microvlm.formats.headers.safetensors_header import TensorHeader, read_header
from microvlm.inputs.processor import TOKENIZER
from microvlm.inputs.processor_files import PREPROCESSOR
from microvlm.sources.model_source import INDEX, WEIGHTS
from microvlm.training.data.download.hub_files import HubListing, fetch_file, hash_file, list_files

SOURCES = "SOURCES.json"
PICKLE = "pytorch_model.bin"
"""Weights of a repository without safetensors."""
_FETCHED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "LICENSE*", PICKLE)
_UNUSED = ("flax_*", "tf_*", "onnx*")
_REMEDY = "delete it, and run the same command again"
Role = Literal["decoder", "vision"]


@dataclass(frozen=True)
class ModelPart:
    """A public model that is one part of a MicroVLM."""

    name: str
    """Of its folder."""
    role: Role
    repository: str
    licence: str
    revision: str | None = None
    """The commit that is fetched unless another is asked for; None: the newest, which is then recorded."""

    @property
    def needed(self) -> tuple[str, ...]:
        """The files without which it cannot be assembled."""
        return (CONFIG, WEIGHTS, TOKENIZER if self.role == "decoder" else PREPROCESSOR)


PARTS = (
    ModelPart(
        "qwen2.5-0.5b",
        "decoder",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "Apache-2.0",
        "7ae557604adf67be50417f59c2c2f167def9a775",
    ),
    ModelPart(
        "qwen2.5-0.5b-base",
        "decoder",
        "Qwen/Qwen2.5-0.5B",
        "Apache-2.0",
        "060db6499f32faf8b98477b0a26969ef7d8b9987",
    ),
    ModelPart("deit-tiny", "vision", "facebook/deit-tiny-distilled-patch16-224", "Apache-2.0"),
    ModelPart("deit-tiny-undistilled", "vision", "facebook/deit-tiny-patch16-224", "Apache-2.0"),
)
BOTH = ("qwen2.5-0.5b", "deit-tiny")


class FileRecord(msgspec.Struct, frozen=True):
    """Size and hash of one file."""

    bytes: Count
    sha256: Sha256


class PartRecord(msgspec.Struct, frozen=True):
    """What is recorded of a part when its folder is complete."""

    repository: str
    revision: str | None
    """The commit; None for files that were put there by hand."""
    pin: Literal["known", "given", "first use", "by hand"]
    licence: str
    files: dict[str, FileRecord]


class SourcesFile(msgspec.Struct, frozen=True):
    """SOURCES.json."""

    format: Literal[1] = 1
    models: dict[str, PartRecord] = {}


def provide(part: ModelPart, output: Path, revision: str | None = None) -> PartRecord:
    """Have a part in `output`/NAME, fetched or put there by hand, whole and as recorded -> its record.

    Raises UserError for files that are missing, damaged or not those that were recorded, and HubUnreachable.
    """
    folder = output / part.name
    record = read_sources(output).models.get(part.name)
    if folder.is_dir() and any(folder.iterdir()):
        if record is None:
            record = _accept(part, folder)
            _write_record(output, part, record)
        elif revision is not None and not _may_be(revision, record.revision):
            raise UserError(
                f"{folder} holds revision {record.revision or 'unknown (put there by hand)'} of {part.repository}: "
                "delete that folder, or give another -o."
            )
        _compare(folder, record)
        check_part(part, folder)
        return record
    if record is not None and revision is None:
        revision = record.revision  # pinned at first use
    return _fetch(part, output, revision)


def by_hand(parts: list[ModelPart], output: Path) -> str:
    """What to put where without a network, as a clause, for the parts that are not there yet."""
    absent = [part for part in parts if not (output / part.name / CONFIG).is_file()]
    return "put " + ", and ".join(
        f"{_joined(part.needed)} of {part.repository} into {output / part.name}" for part in absent
    )


def read_sources(output: Path) -> SourcesFile:
    """The record of a folder of models; an empty one where there is none. Raises UserError for a damaged one."""
    try:
        return documents.load(output / SOURCES, SourcesFile, _REMEDY)
    except FileNotFoundError:
        return SourcesFile()


def check_part(part: ModelPart, folder: Path) -> None:
    """Compare a part's files with each other: config.json with the header of every file of weights; tokenizer.

    Raises UserError, one sentence.
    """
    from microvlm.model.pretrained.hf_config import text_config, vision_config

    missing = [name for name in part.needed if not (folder / name).is_file()]
    if WEIGHTS in missing and any((folder / name).is_file() for name in (INDEX, PICKLE)):
        missing.remove(WEIGHTS)
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: put it there, or delete the folder to fetch it."
        )
    tensors: dict[str, TensorHeader] = {}
    expected: dict[str, tuple[int, ...]]
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_header(path, _REMEDY).tensors
    if part.role == "decoder":
        text = text_config(folder)
        expected = {"embed_tokens.weight": (text.vocab_size, text.hidden_size)}
        layers = text.num_hidden_layers
        documents.load(folder / TOKENIZER, _Tokenizer, _REMEDY)
    else:
        vision = vision_config(folder)
        first = 2 if vision.distillation_token else 1
        expected = {
            "embeddings.cls_token": (1, 1, vision.hidden_size),
            "embeddings.position_embeddings": (1, first + vision.num_patches, vision.hidden_size),
        }
        layers = vision.num_hidden_layers
    if tensors:
        _compare_shapes(folder, tensors, expected, layers)


class _Tokenizer(msgspec.Struct, frozen=True):
    """What is looked at of a tokenizer.json."""

    model: msgspec.Raw


def _compare_shapes(
    folder: Path, tensors: dict[str, TensorHeader], expected: dict[str, tuple[int, ...]], layers: int
) -> None:
    for suffix, shape in expected.items():
        found = [tensor.shape for name, tensor in tensors.items() if name.endswith(suffix)]
        if found != [shape]:
            sizes = " x ".join(map(str, found[0])) if found else "missing"
            raise UserError(
                f"{folder}: the weights do not belong to config.json ('{suffix}' is {sizes}, not "
                f"{' x '.join(map(str, shape))}): get both from one revision."
            )
    numbers = {int(match[1]) for name in tensors if (match := re.search(r"\blayers?\.(\d+)\.", name))}
    if numbers != set(range(layers)):
        raise UserError(
            f"{folder}: the weights have {len(numbers)} layers and config.json {layers}: get both from one revision."
        )


def _accept(part: ModelPart, folder: Path) -> PartRecord:
    """Check the files that somebody put into a folder, and describe them."""
    check_part(part, folder)
    return PartRecord(part.repository, None, "by hand", part.licence, _hash_files(folder))


def _fetch(part: ModelPart, output: Path, revision: str | None) -> PartRecord:
    """Fetch a part into a folder beside its own, check it, and give it its name."""
    folder = output / part.name
    partial = output / f".{part.name}.partial"
    listing = _needed_files(list_files(part.repository, revision or part.revision, _FETCHED), part)
    with os_errors_about(output):
        partial.mkdir(parents=True, exist_ok=True)
    for file in listing.files:
        fetch_file(listing, file, partial)
    wanted = {file.name for file in listing.files}
    with os_errors_about(output):
        for path in partial.iterdir():
            if path.name not in wanted:  # of another revision
                path.unlink()
        check_part(part, partial)
        pin: Literal["known", "given", "first use"] = "first use"
        if revision is not None:
            pin = "given"
        elif part.revision is not None:
            pin = "known"
        record = PartRecord(part.repository, listing.commit, pin, part.licence, _hash_files(partial))
        if folder.is_dir():
            folder.rmdir()  # empty, or it would have been looked at
        os.rename(partial, folder)
        _write_record(output, part, record)
    return record


def _needed_files(listing: HubListing, part: ModelPart) -> HubListing:
    """The listing without what is not needed: other frameworks' files, and pickles where safetensors are."""
    names = {file.name for file in listing.files}
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    files = tuple(
        file
        for file in listing.files
        if not file.name.startswith(tuple(name.rstrip("*") for name in _UNUSED))
        and not (has_safetensors and file.name == PICKLE)
    )
    absent = [name for name in part.needed if name not in names and name != WEIGHTS]
    if absent or not (has_safetensors or PICKLE in names):
        raise UserError(
            f"{part.repository} at {listing.commit} lacks {_joined(absent or [WEIGHTS])}: give another --revision."
        )
    return HubListing(listing.repository, listing.kind, listing.commit, files)


def _compare(folder: Path, record: PartRecord) -> None:
    """Raises UserError where a recorded file is missing or has another content."""
    for name, known in record.files.items():
        path = folder / os.path.basename(name)
        with os_errors_about(path):
            if not path.is_file():
                raise UserError(
                    f"{path} is missing since it was recorded: delete {folder}, and run this again."
                )
            if path.stat().st_size != known.bytes or hash_file(path) != known.sha256:
                raise UserError(
                    f"{path} is not the file that {SOURCES} records: delete {folder} and its entry there, and run "
                    "this again."
                )


def _hash_files(folder: Path) -> dict[str, FileRecord]:
    with os_errors_about(folder):
        return {
            path.name: FileRecord(path.stat().st_size, hash_file(path))
            for path in sorted(folder.iterdir())
            if path.is_file() and not path.name.startswith(".")
        }


def _write_record(output: Path, part: ModelPart, record: PartRecord) -> None:
    models = {**read_sources(output).models, part.name: record}
    content = msgspec.json.format(msgspec.json.encode(SourcesFile(models=models)), indent=2)
    write_file(output / SOURCES, content + b"\n")


def _may_be(revision: str, commit: str | None) -> bool:
    """Whether a revision can mean this commit: a branch or a tag can, a hash must be its own."""
    is_hash = re.fullmatch("[0-9a-f]{7,40}", revision) is not None
    return commit is not None and (not is_hash or commit.startswith(revision))


def _joined(names: tuple[str, ...] | list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
