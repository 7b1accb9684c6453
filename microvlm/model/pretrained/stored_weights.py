"""Tensors in the files of a pretrained part, read one at a time: safetensors, or pickles by torch's safe loader.

Names, shapes and dtypes come first; a tensor takes memory only while it is copied.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import quote
from microvlm.formats.headers.safetensors_header import TensorHeader, read_header
from microvlm.formats.manifest import is_safe_name
from microvlm.model.pretrained.hf_config import read_json
from microvlm.model.tensor_writer import LazyTensor
from microvlm.sources.model_source import INDEX, PICKLED, PICKLED_INDEX, WEIGHTS

_REMEDY = "copy the checkpoint again"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
KEPT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights that are stored as they are; float64 becomes float32."""


class PartWeights(NamedTuple):
    """The tensors of a part by the names that its files have, and what errors call the files."""

    origin: str
    tensors: dict[str, LazyTensor]


class _Index(msgspec.Struct, frozen=True):
    """The file that says in which shard a tensor is."""

    weight_map: dict[str, str]


def folder_weights(folder: Path) -> PartWeights:
    """The weights of a Hugging Face folder; safetensors are preferred to pickles. Raises UserError."""
    for name, index, read in ((WEIGHTS, INDEX, _safetensors), (PICKLED, PICKLED_INDEX, _pickled)):
        if (folder / name).is_file():
            return PartWeights(str(folder / name), dict(read(folder / name)))
        if (folder / index).is_file():
            tensors: dict[str, LazyTensor] = {}
            for path in _shards(folder / index):
                tensors.update(read(path))
            return PartWeights(str(folder / index), tensors)
    raise UserError(f"{folder} has no {WEIGHTS} and no {PICKLED}: {_REMEDY}.")


def _shards(index: Path) -> list[Path]:
    names = set(read_json(index, _Index).weight_map.values())
    if any(not is_safe_name(name) or "/" in name for name in names):
        raise UserError(f"{index} does not map weights to files beside it: {_REMEDY}.")
    return [index.parent / name for name in sorted(names)]


def _safetensors(path: Path) -> Iterator[tuple[str, LazyTensor]]:
    try:
        header = read_header(path, _REMEDY)
    except FileNotFoundError:
        raise _missing(path) from None
    for name, tensor in header.tensors.items():
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{path}: {quote(name)} is stored as {quote(tensor.dtype)}, which is not supported."
            )
        yield name, LazyTensor(tensor.shape, _DTYPES[tensor.dtype], partial(_read_bytes, path, tensor))


def _read_bytes(path: Path, tensor: TensorHeader) -> Tensor:
    dtype = _DTYPES[tensor.dtype]
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(read_range(path, tensor.start, tensor.nbytes), dtype=dtype).reshape(tensor.shape)


def read_range(path: Path, start: int, nbytes: int) -> bytearray:
    """Bytes of a file, in memory that torch may write to. Raises UserError when the file was cut meanwhile."""
    content = bytearray(nbytes)
    try:
        with documents.open_regular(path) as file:
            file.seek(start)
            length = file.readinto(content)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise _missing(path) from None
    if length != nbytes:
        raise UserError(f"{path} was cut while it was read: {_REMEDY}.")
    return content


def _pickled(path: Path) -> Iterator[tuple[str, LazyTensor]]:
    """Tensors of a file of `torch.save`. The loader builds tensors and nothing else, whatever the pickle asks for."""
    try:
        with documents.open_regular(path) as file:
            is_archive = file.read(2) == b"PK"
    except FileNotFoundError:
        raise _missing(path) from None
    with _loader_errors(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} does not hold tensors by name: convert it to {WEIGHTS}.")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise UserError(f"{path} holds something beside tensors, {quote(name)}: convert it to {WEIGHTS}.")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{path}: {quote(name)} is no plain tensor: convert it to {WEIGHTS}.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # Strides of 0 make a tensor of any size from a few bytes.
            raise UserError(
                f"{path}: {quote(name)} is larger than what is stored of it: copy the checkpoint again."
            )
        yield name, LazyTensor(tuple(tensor.shape), tensor.dtype, partial(_detached, path, tensor))


def _detached(path: Path, tensor: Tensor) -> Tensor:
    with _loader_errors(path):
        return tensor.detach().clone(memory_format=torch.contiguous_format)


@contextmanager
def _loader_errors(path: Path) -> Iterator[None]:
    """Torch's loader raises what a damaged archive or pickle makes of it: any of a dozen kinds, after warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds code or objects beside tensors, which are never loaded: take a model with {WEIGHTS}."
        ) from None
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): {_REMEDY}.") from None


def _missing(path: Path) -> UserError:
    return UserError(f"{path} is missing: {_REMEDY}.")


def require_names(weights: PartWeights, names: Iterable[str]) -> None:
    """Raise UserError unless `weights` has exactly these names."""
    expected = set(names)
    for keys, verb in (
        (expected - set(weights.tensors), "lacks"),
        (set(weights.tensors) - expected, "has an unexpected"),
    ):
        if keys:
            raise UserError(
                f"{weights.origin} {verb} {quote(min(keys))} ({len(keys)} such keys): it does not fit its config.json."
            )
