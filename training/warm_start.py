"""Float weights of a stored checkpoint, for a stage to start from: what the model computed with, no latent weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from microvlm import packing
from microvlm.checkpoint import WEIGHTS, read_tensors, resolve_checkpoint
from microvlm.errors import UserError
from microvlm.model import MicroVLM
from microvlm.op_table import TERNARY_LAYOUTS


def weights_sha256(source: str) -> str:
    """The hash of a checkpoint's weights: how a run's log names what it started from."""
    with (resolve_checkpoint(source) / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def float_weights(source: str) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names of a float model, float32. Raises UserError for one it cannot widen."""
    path = resolve_checkpoint(source) / WEIGHTS
    tensors, metadata = read_tensors(path)
    for name, layer in json.loads(metadata.get("layers", "{}")).items():
        packed, scale = tensors.pop(f"{name}.packed", None), tensors.pop(f"{name}.scale", None)
        if packed is None or scale is None or layer["kind"] not in (*TERNARY_LAYOUTS, "int8"):
            raise UserError(f"{path} stores {name} as {layer['kind']}, which no stage can start from.")
        rows = scale.numpy()[:, None] if scale.numel() > 1 else scale.numpy()
        weight = torch.from_numpy(_integers(layer, packed.numpy()).astype(np.float32) * rows)
        tensors[("embedding" if name.startswith("embedding.") else name) + ".weight"] = weight
    return {name: tensor.float() for name, tensor in tensors.items()}


def _integers(layer: dict, packed: np.ndarray) -> np.ndarray:
    if layer["kind"] in TERNARY_LAYOUTS:
        return packing.unpack_trits(packed, layer["rows"], TERNARY_LAYOUTS[layer["kind"]])
    return packing.unpack_rows_int8(packed)


def start_from(model: MicroVLM, source: str, fresh: Sequence[str] = ()) -> list[str]:
    """Load a checkpoint's float weights; returns the parameters it does not have, which keep their first values.

    fresh : parts of the model (the first words of parameter names) that are not taken from the checkpoint.
    Raises UserError when the checkpoint has a weight that the model lacks, or one of another shape.
    """
    wanted = model.state_dict()
    unknown = [part for part in fresh if not any(name.startswith(f"{part}.") for name in wanted)]
    if unknown:
        raise UserError(f"the model has no part '{unknown[0]}' that could begin anew.")
    tensors = {name: t for name, t in float_weights(source).items() if name.split(".")[0] not in fresh}
    for name, tensor in tensors.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            raise UserError(f"'{source}' is another model's checkpoint: its '{name}' does not fit.")
    model.load_state_dict(tensors, strict=False)
    return sorted(set(wanted) - set(tensors))
