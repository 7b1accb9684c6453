"""One shape in one format, many times over, as an ONNX file whose weights lie beside it as in a bundle.

Every copy reads the graph's one input `x` and its own bytes of the file. No two copies are equal, because ONNX Runtime
keeps equal initializers once and would read them from a cache. Results that nothing reads are outputs; the caller gives
outputs of one width the same memory, as ONNX Runtime does for the activations of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from microvlm.bench.kernels.contender_formats import Format, Operands
from microvlm.bench.kernels.workload import Shape

if TYPE_CHECKING:
    import onnx

_IR_VERSION = 10
_INLINE_BELOW_BYTES = 1024
_ALIGNMENT_BYTES = 64
_PAGE_ALIGN_ABOVE_BYTES = 1 << 20
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class ShapeGraph:
    """A file that was written. `weight_bytes` is what one run reads, scales included."""

    path: Path
    copies: int
    weight_bytes: int
    outputs: tuple[tuple[str, int], ...]
    """Name and width of each."""


def random_operands(form: Format, shape: Shape, seed: int = 0) -> tuple[Operands, ...]:
    """The constant inputs of each linear of a shape."""
    rng = np.random.default_rng(seed)
    return tuple(form.operands(rng, linear.k, linear.n) for linear in shape.linears)


def bytes_of(operands: tuple[Operands, ...]) -> int:
    return sum(array.nbytes for linear in operands for array in linear)


def copy_of(operands: tuple[Operands, ...], copy: int) -> tuple[Operands, ...]:
    """The weights of copy number `copy`: the same rows and bytes in another order, which costs nothing to make."""
    return tuple(tuple(_rolled(array, copy) for array in linear) for linear in operands)


def _rolled(array: np.ndarray, copy: int) -> np.ndarray:
    turns, rows = divmod(copy, array.shape[0])
    return np.roll(array, (rows, turns), (0, -1)) if array.ndim > 1 else array


def write_graph(
    path: Path, form: Format, shape: Shape, operands: tuple[Operands, ...], copies: int
) -> ShapeGraph:
    """Write PATH (.onnx) and its weights beside it (.data). Raises OSError."""
    from onnx import TensorProto, helper

    from microvlm.exporters.contract import OPSET
    from microvlm.exporters.function_bodies import functions_for
    from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION

    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    outputs: list[tuple[str, int]] = []
    results = {linear.name for linear in shape.results}
    with path.with_suffix(".data").open("wb") as file:
        for copy in range(copies):
            for linear, arrays in zip(shape.linears, copy_of(operands, copy), strict=True):
                y = f"{linear.name}.{copy}"
                names = [f"{y}.{place}" for place in range(len(arrays))]
                initializers += [_place(file, *pair) for pair in zip(names, arrays, strict=True)]
                source = "x" if linear.source == "x" else f"{linear.source}.{copy}"
                nodes.append(form.node(source, names, y, linear.k, linear.n))
                outputs += [(y, linear.n)] if linear.name in results else []
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", shape.inputs])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["M", width]) for y, width in outputs],
        initializers,
    )
    domains = (("", OPSET), (DOMAIN, DOMAIN_VERSION), ("com.microsoft", 1))
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*pair) for pair in domains], ir_version=_IR_VERSION
    )
    model.functions.extend(functions_for(nodes))
    path.write_bytes(model.SerializeToString())
    return ShapeGraph(path, copies, copies * bytes_of(operands), tuple(outputs))


def _place(file: BinaryIO, name: str, array: np.ndarray) -> onnx.TensorProto:
    """An initializer: small ones in the graph, others at the end of `file`, aligned as the exporter aligns them."""
    from onnx import TensorProto, numpy_helper

    if array.nbytes < _INLINE_BELOW_BYTES:
        return numpy_helper.from_array(array, name)
    alignment = _PAGE_BYTES if array.nbytes > _PAGE_ALIGN_ABOVE_BYTES else _ALIGNMENT_BYTES
    file.seek(-file.tell() % alignment, 1)
    tensor = numpy_helper.from_array(array[:0], name)
    del tensor.dims[:]
    tensor.dims.extend(array.shape)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    facts: dict[str, Any] = {"location": Path(file.name).name, "offset": file.tell(), "length": array.nbytes}
    for key, value in facts.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    file.write(np.ascontiguousarray(array).data)
    return tensor
