"""The tensors in the files of a model, held against its configuration. Reads headers only, and needs no torch."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import NamedTuple

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.formats.headers.safetensors_header import read_header
from microvlm.formats.lowered_layer import LAYERS, LoweredLayer, parse_layers
from microvlm.formats.manifest import Manifest
from microvlm.formats.onnx_weights import read_initializers
from microvlm.formats.weight_shapes import compare_types, stored_types

_COMPUTED = ("memory_encoder.pseudo_inverse",)
"""Stored but computed from a formula: it has bytes and no parameters."""


class StoredTensor(NamedTuple):
    """One tensor of a file. `name` is its `state_dict` key."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """See `TensorType`."""
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
    return prod(tensor.shape)


def read_bundle(folder: Path, manifest: Manifest, config: MicroVLMConfig) -> dict[str, StoredTensor]:
    """The tensors of a bundle's graphs and of its memory prior, by name.

    Raises UserError for a file that cannot be read, and for tensors that are not those of `config`.
    """
    if manifest.lowering != "custom":
        raise UserError(
            f"{folder} has the weights of --lowering {quote(manifest.lowering)}, which only its graphs can read: "
            "run it with --backend ort, or give the checkpoint."
        )
    tensors: dict[str, StoredTensor] = {}
    for graph in manifest.graphs.values():
        for tensor in read_initializers(folder / graph.file):
            # A tensor that two graphs share is stored once.
            tensors[tensor.name] = StoredTensor(tensor.name, tensor.shape, tensor.kind, tensor.nbytes)
    prior, _ = _read_safetensors(folder / "memory_prior.safetensors", "copy or export the bundle again")
    tensors |= prior
    compare_types(stored_types(config, manifest.lowered, folder), tensors, folder)
    return tensors


def read_checkpoint(
    path: Path, config: MicroVLMConfig
) -> tuple[dict[str, StoredTensor], dict[str, LoweredLayer]]:
    """(the tensors of a checkpoint's weights, the file `path`, by name; its lowered layers).

    Raises UserError for a file that cannot be read, and for tensors that are not those of `config`.
    """
    tensors, metadata = _read_safetensors(path, "copy the checkpoint again")
    layers = parse_layers(metadata.get(LAYERS, "{}"), path)
    compare_types(stored_types(config, layers, path), tensors, path)
    return tensors, layers


def _read_safetensors(path: Path, remedy: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata."""
    try:
        header = read_header(path, remedy)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}.") from None
    tensors = {
        name: StoredTensor(name, tensor.shape, tensor.kind, tensor.nbytes)
        for name, tensor in header.tensors.items()
    }
    return tensors, header.metadata
