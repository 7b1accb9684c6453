"""The tensors in the files of a model, with the layers they belong to. Reads headers only, and needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from microvlm.errors import UserError
from microvlm.formats.lowered_layer import LAYERS, LoweredLayer, parse_layers
from microvlm.formats.safetensors_header import read_header

_COMPUTED = ("memory_encoder.pseudo_inverse",)
"""Stored but computed from a formula: it has bytes and no parameters."""


class StoredTensor(NamedTuple):
    """One tensor of a file. `name` is its `state_dict` key."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


def parameters_of(tensor: StoredTensor, layers: dict[str, LoweredLayer]) -> int:
    """Number of weights that a tensor stores: 0 for scales, multipliers and computed tensors."""
    owner, _, leaf = tensor.name.rpartition(".")
    if tensor.name in _COMPUTED:
        return 0
    if owner in layers and leaf in ("packed", "weight"):
        return layers[owner].rows * layers[owner].columns
    if owner in layers and leaf in ("scale", "multiplier"):
        return 0
    count = 1
    for length in tensor.shape:
        count *= length
    return count


def read_bundle(directory: Path) -> tuple[list[StoredTensor], dict[str, LoweredLayer]]:
    """The tensors of a bundle's graphs and its lowered layers. Raises UserError for a bad bundle."""
    from microvlm.formats.bundle import open_bundle
    from microvlm.formats.onnx_weights import read_initializers

    manifest = open_bundle(directory)
    tensors: dict[str, StoredTensor] = {}
    for graph in manifest.graphs.values():
        for tensor in read_initializers(directory / graph.file):
            # A tensor that two graphs share is stored once.
            tensors[tensor.name] = StoredTensor(tensor.name, tensor.shape, tensor.nbytes)
    prior, _ = _read_safetensors(directory / "memory_prior.safetensors")
    return [*tensors.values(), *prior], manifest.lowered


def read_checkpoint(directory: Path) -> tuple[list[StoredTensor], dict[str, LoweredLayer]]:
    """The tensors of model.safetensors and its packed layers. Raises UserError for a bad file."""
    path = directory / "model.safetensors"
    tensors, metadata = _read_safetensors(path)
    return tensors, parse_layers(metadata.get(LAYERS, "{}"), path)


def _read_safetensors(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """Names, shapes and bytes from the header of a safetensors file, and its metadata."""
    try:
        header = read_header(path, "copy the checkpoint again")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the checkpoint again.") from None
    stored = [StoredTensor(name, tensor.shape, tensor.nbytes) for name, tensor in header.tensors.items()]
    return stored, header.metadata
