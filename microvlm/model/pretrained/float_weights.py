"""Reads a checkpoint's weights as the float values that the stored model computes with, packed ones included.

Whole numbers that a model computes with stay as they are: those of a convolutional encoder.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from microvlm.errors import UserError
from microvlm.formats.lowered_layer import LAYERS, parse_layers
from microvlm.formats.op_table import MATMUL_BY_KIND
from microvlm.model.checkpoint import WEIGHTS, read_tensors, resolve_checkpoint


def float_weights(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A checkpoint's tensors under a float model's names: float32, and the whole numbers of a convolutional encoder.

    Raises UserError for a kind without float values.
    """
    path = resolve_checkpoint(source) / WEIGHTS
    tensors, metadata = read_tensors(path)
    for name, layer in parse_layers(metadata.get(LAYERS, "{}"), path).items():
        packed, scale = tensors.pop(f"{name}.packed", None), tensors.pop(f"{name}.scale", None)
        op = MATMUL_BY_KIND.get(layer.kind)
        if packed is None or scale is None or op is None or op.has_multiplier:
            raise UserError(f"{path} stores {name} as {layer.kind}, which no stage can start from.")
        rows = scale.numpy()[:, None] if scale.numel() > 1 else scale.numpy()
        integers = op.unpack(packed.numpy(), rows=layer.rows, columns=layer.columns)
        weight = torch.from_numpy(integers.astype(np.float32) * rows)
        tensors[("embedding" if name.startswith("embedding.") else name) + ".weight"] = weight
    # A bias of 32 bits does not fit the 24 of a float32.
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
