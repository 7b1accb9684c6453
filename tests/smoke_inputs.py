"""Writes what smoke_wheel.py reads: for every operator a graph of one node with its function body, and an input.

Runs where the exporter's packages are: `python tests/smoke_inputs.py FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from test_function_bodies import GATHERS, attributes_of, one_node_model, operands

from microvlm.formats.op_table import OPS

ROWS, COLUMNS, TOKENS = 515, 576, 5


def write(folder: Path) -> None:
    """`OP.onnx` and `OP.npz` (`input`, the weights by name, attributes as 0-d integers) for each of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for op in OPS.values():
        weights, attributes = operands(op, ROWS, COLUMNS), attributes_of(op, ROWS, COLUMNS)
        activations = rng.normal(size=(TOKENS, COLUMNS)).astype(np.float32)
        value = rng.integers(0, ROWS, (TOKENS,)) if op in GATHERS else activations
        onnx.save(one_node_model(op, weights, attributes, value.ndim), folder / f"{op.name}.onnx")
        np.savez(folder / f"{op.name}.npz", input=value, **weights, **attributes)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
