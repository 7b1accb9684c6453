"""Write graphs and their weights: data files beside the .onnx files, aligned so that kernels read the mapped bytes.

A tensor of 1 KiB or more goes to a data file at a multiple of 64 bytes, or above 1 MiB of 4096 bytes (a page), so that
ONNX Runtime passes the mapped pointer to the kernel. Each graph has its own data file. Tensors of the tied embedding
are stored once, in a file that the token embedding and the decoder's head share.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir

from microvlm.exporters.contract import OPSET
from microvlm.exporters.function_bodies import functions_for

INLINE_BELOW_BYTES = 1024
ALIGNMENT_BYTES = 64
PAGE_ALIGN_ABOVE_BYTES = 1 << 20
PAGE_BYTES = 4096
SHARED_PREFIX = "embedding."
SHARED_FILE = "embedding.data"


def data_file(graph: str) -> str:
    """The name of a graph's data file, relative to its .onnx file."""
    return f"{graph}.data"


class WeightStore:
    """Data files in one directory, to which tensors are appended; a tensor of a known name is not written again."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._placed: dict[tuple[str, str], tuple[int, int]] = {}

    def place(self, tensor: onnx_ir.TensorProtocol, name: str, graph: str) -> onnx_ir.ExternalTensor:
        """Write `tensor` under `name` unless its file has it, and return the reference to it. Raises OSError."""
        file = SHARED_FILE if name.startswith(SHARED_PREFIX) else data_file(graph)
        if (file, name) not in self._placed:
            self._placed[file, name] = self._append(self.directory / file, tensor)
        offset, length = self._placed[file, name]
        shape = onnx_ir.Shape(tensor.numpy().shape)
        return onnx_ir.ExternalTensor(
            file, offset, length, tensor.dtype, shape=shape, name=name, base_dir=self.directory
        )

    @staticmethod
    def _append(path: Path, tensor: onnx_ir.TensorProtocol) -> tuple[int, int]:
        alignment = PAGE_BYTES if tensor.nbytes > PAGE_ALIGN_ABOVE_BYTES else ALIGNMENT_BYTES
        with path.open("ab") as file:
            offset = -(-file.tell() // alignment) * alignment
            file.write(b"\0" * (offset - file.tell()))
            file.write(tensor.tobytes())
            if file.tell() != offset + tensor.nbytes:
                raise RuntimeError(f"{path.name}: a tensor's bytes are not its dtype times its shape")
        return offset, tensor.nbytes


def save_graph(model: onnx_ir.Model, graph: str, store: WeightStore) -> onnx.ModelProto:
    """Write GRAPH.onnx and its weights into the store's directory and return the protobuf. Raises OSError.

    The functions that define our operators are attached last, because optimizers would inline them.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= INLINE_BELOW_BYTES:
            value.const_value = store.place(tensor, name, graph)
    proto = onnx_ir.serde.serialize_model(model)
    functions = functions_for(proto.graph.node)
    opset = model.graph.opset_imports.get("", OPSET)
    for imported in (each for function in functions for each in function.opset_import if not each.domain):
        imported.version = opset  # where it is inlined, a function's nodes are the graph's
    proto.functions.extend(functions)
    (store.directory / f"{graph}.onnx").write_bytes(proto.SerializeToString())
    return proto
