"""One graph of the contract table from a lowered model, by torch's exporter, our operators staying one node each.

Every weight keeps its `state_dict` key as its initializer name and its bytes as they are, so that a bundle's graphs
hold the whole model and can be read back as one. Nothing here writes a file.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import onnx.defs
import onnx_ir
import onnxscript
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration

from microvlm.exporters import contract
from microvlm.exporters.contract import OPSET, Dim, GraphSpec, TensorSpec
from microvlm.exporters.convolution_nodes import CONVOLUTION_NODES
from microvlm.exporters.graph_cleanup import tidy
from microvlm.formats.layer_table import MASK, ROTATION
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION, OPS
from microvlm.model.memory_algebra import address, reference_memory
from microvlm.model.microvlm import MicroVLM

_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "int64": "tensor(int64)"}
# Sizes of an example, all different and above 1, so that the tracer neither specialises nor unifies them.
_EXAMPLE: dict[Dim, int] = {contract.BATCH: 2, contract.SEQUENCE: 5, contract.PAST: 7, contract.TOTAL: 12}
# Method of MicroVLM -> the parts of the model that it uses.
_PARTS: dict[str, tuple[str, ...]] = {
    "encode_image": ("vision", "adapter"),
    "embed": ("embedding",),
    "memory_encode": ("memory_encoder",),
    "memory_write": (),
    "memory_forget": (),
    "memory_read": ("memory_encoder", "scope", "memory_projection"),
    "decode": ("decoder", "embedding"),
}


class _Graph(nn.Module):
    """A method of MicroVLM over flat tensors in contract order."""

    def __init__(self, model: MicroVLM, spec: GraphSpec):
        super().__init__()
        self.model = model
        self.spec = spec

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return call(self.model, self.spec, inputs)


def call(model: MicroVLM, spec: GraphSpec, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run a graph's method in eager torch: flat tensors in, flat tensors out, both in contract order."""
    if spec.method == "decode":
        embeds, mask, positions, keep, *flat = inputs
        past = list(zip(flat[0::2], flat[1::2], strict=True))
        logits, present = model.decode(embeds, mask, positions, past, keep)
        return (logits, *_flatten(present))
    result = getattr(model, spec.method)(*inputs)
    if spec.method == "memory_read":
        code, scope, residual, slot = result
        return (code, scope, residual, *_flatten(slot))
    return result if isinstance(result, tuple) else (result,)


def _flatten(cache: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in cache for tensor in pair]


def example_inputs(
    spec: GraphSpec, sizes: dict[Dim, int], seed: int = 0, vocab_size: int = 2
) -> tuple[Tensor, ...]:
    """Seeded inputs of a graph in contract order; `sizes` gives each symbolic dimension.

    Codes are of unit length, keys are made from them as the model makes them, and covariances are symmetric and
    positive. Of a batch, the
    first row's mask hides its first position: the memory slot of a decoder, a padding token of a memory encoder.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = {tensor.name: _example(tensor, sizes, generator, vocab_size) for tensor in spec.inputs}
    if {"memory_key", "memory_code"} <= examples.keys():
        # A key is the part of its code inside the key space. A key of any other length leaves nothing outside of that
        # space, where the scope detector compares codes: its cosine would be a quotient of rounding errors.
        code, slots = examples["memory_code"], examples["memory_key"].shape[-1]
        examples["memory_key"] = address(code, reference_memory(slots, code.shape[-1]).mT)
    return tuple(examples.values())


def _example(
    tensor: TensorSpec, sizes: dict[Dim, int], generator: torch.Generator, vocab_size: int
) -> Tensor:
    shape = [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.shape]
    if tensor.name == "input_ids":
        return torch.randint(0, vocab_size, shape, generator=generator)
    if tensor.name == "attention_mask":
        mask = torch.ones(shape, dtype=torch.int64)
        mask[0, 0] = int(shape[0] == 1)
        return mask
    if tensor.name == "position_ids":
        past = sizes[contract.PAST]
        return torch.arange(past, past + shape[1]).expand(shape).contiguous()
    if tensor.name == "num_logits_to_keep":
        return torch.tensor(min(2, sizes[contract.SEQUENCE]))
    gaussian = torch.randn(shape, generator=generator)
    if tensor.name == "memory_code":
        return nn.functional.normalize(gaussian, dim=-1)
    if tensor.name == "memory_cov":
        return torch.eye(shape[-1]) + gaussian @ gaussian.transpose(1, 2) / shape[-1]
    return gaussian


def trace(model: MicroVLM, spec: GraphSpec, fuses: bool = True) -> onnx_ir.Model:
    """The graph of `spec`, inputs and outputs named, typed and shaped exactly as the contract says.

    `model` is lowered and set to traced; without `fuses` products stay
    nodes of their own. Raises RuntimeError when torch gives a graph that breaks the contract.
    """
    inputs = example_inputs(spec, _EXAMPLE, vocab_size=model.config.text.vocab_size)
    graph = _export(
        _Graph(_only(model, _PARTS[spec.method]), spec).eval(),
        inputs,
        [tensor.name for tensor in spec.inputs],
        [tensor.name for tensor in spec.outputs],
        {"inputs": tuple(_dynamic(tensor) for tensor in spec.inputs)},
    )
    graph.graph.name = spec.name
    tidy(graph, set(model.state_dict()), "model.", fuses)
    _apply_contract(graph, spec)
    return graph


def _only(model: MicroVLM, parts: tuple[str, ...]) -> MicroVLM:
    """The same model without its other parts: torch's exporter takes time for every weight, read or not.

    The order of the parts stays, since that of a graph's weights follows it.
    """
    smaller = copy.copy(model)
    smaller._modules = {name: module for name, module in model._modules.items() if name in parts}
    return smaller


def graph_of(module: nn.Module, example: Tensor) -> onnx_ir.Model:
    """The graph of a module that is no part of a bundle, from `pixel_values` [B, ...] to `features`, for any B."""
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return _export(module, (example,), ["pixel_values"], ["features"], dynamic)


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], results: list[str], dynamic: Any
) -> onnx_ir.Model:
    with _quiet(), _without_repeated_work(), torch.no_grad():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=results,
            dynamic_shapes=dynamic,
            custom_translation_table=_translations(),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _dynamic(tensor: TensorSpec) -> dict[int, Any]:
    return {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}


def _schema(op: OpSpec) -> onnx.defs.OpSchema:
    operands = [onnx.defs.OpSchema.FormalParameter(o.name, _TYPES[o.dtype]) for o in op.inputs]
    output = onnx.defs.OpSchema.FormalParameter(op.output.name, _TYPES[op.output.dtype])
    attributes = [
        onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.INT) for name in op.attributes
    ]
    return onnx.defs.OpSchema(
        op.name, DOMAIN, DOMAIN_VERSION, inputs=operands, outputs=[output], attributes=attributes
    )


def _translation(op: OpSpec) -> Callable:
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), op.name, _schema(op))

    def translate(*operands: Any, **attributes: Any) -> Any:
        # torch passes an int argument of the custom op after its tensors.
        count = len(op.inputs)
        return node(
            *operands[:count], **dict(zip(op.attributes, operands[count:], strict=False)), **attributes
        )

    return translate


def _keep_last(hidden: Any, count: Any) -> Any:
    op = onnxscript.values.Opset("", OPSET)
    axis = op.Constant(value_ints=[1])
    begin = op.Reshape(op.Neg(count), op.Constant(value_ints=[1]))
    return op.Slice(hidden, begin, op.Constant(value_ints=[2**63 - 1]), axis)


def _decoder_mask(attention_mask: Any, position_ids: Any) -> Any:
    parameter = onnx.defs.OpSchema.FormalParameter
    schema = onnx.defs.OpSchema(
        MASK,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[parameter(name, "tensor(int64)") for name in ("attention_mask", "position_ids")],
        outputs=[parameter("visible", "tensor(bool)")],
    )
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), MASK, schema)
    return node(attention_mask, position_ids)


def _rotate_blocks(x: Any, width: int) -> Any:
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    schema = onnx.defs.OpSchema(
        ROTATION,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[parameter("x", "tensor(float)")],
        outputs=[parameter("y", "tensor(float)")],
        attributes=[attribute("width", onnx.defs.OpSchema.AttrType.INT)],
    )
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), ROTATION, schema)
    return node(x, width=width)


def _translations() -> dict[Callable, Callable]:
    namespace = torch.ops.microvlm
    table = {getattr(namespace, op.torch_op).default: _translation(op) for op in OPS.values()}
    return {
        **table,
        namespace.keep_last.default: _keep_last,
        namespace.decoder_mask.default: _decoder_mask,
        namespace.rotate_blocks.default: _rotate_blocks,
        **{getattr(namespace, name).default: function for name, function in CONVOLUTION_NODES.items()},
    }


def _apply_contract(model: onnx_ir.Model, spec: GraphSpec) -> None:
    """Give inputs and outputs the contract's symbolic dimensions, after checking names, dtypes and fixed sizes."""
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        if [value.name for value in values] != [tensor.name for tensor in tensors]:
            raise RuntimeError(f"{spec.name}: traced {[value.name for value in values]}")
        for value, tensor in zip(values, tensors, strict=True):
            _check(value, tensor, spec.name)
            value.shape = onnx_ir.Shape(tensor.shape)


def _check(value: onnx_ir.Value, tensor: TensorSpec, graph: str) -> None:
    if value.dtype is None or value.dtype.numpy().name != tensor.dtype:
        raise RuntimeError(
            f"{graph}: {tensor.name} was traced as {value.dtype}, the contract says {tensor.dtype}"
        )
    traced = None if value.shape is None else list(value.shape)
    fits = traced is not None and len(traced) == len(tensor.shape)
    for traced_size, contract_size in zip(traced or [], tensor.shape, strict=False):
        is_equal = traced_size == contract_size
        fits = fits and (is_equal if isinstance(contract_size, int) else not isinstance(traced_size, int))
    if not fits:
        raise RuntimeError(f"{graph}: {tensor.name} was traced as {traced}, the contract says {tensor.shape}")


@contextlib.contextmanager
def _without_repeated_work() -> Iterator[None]:
    """A third less time, by two things that torch's exporter does again and again and that change no graph.

    It compiles its several hundred operators anew for each graph; within, the first graph's serve all. And the
    collector walks the objects of a trace over and over and finds little: it waits until the graph is done.
    """
    # A name of torch's own: where another version lacks it, each graph compiles its operators.
    apis = getattr(_registration, "onnxscript_apis", None)
    compile_operators = getattr(apis, "get_torchlib_ops", None)
    collects = gc.isenabled()
    gc.disable()
    if apis is not None and compile_operators:
        apis.get_torchlib_ops = lambda: _operators(compile_operators)
    try:
        yield
    finally:
        if apis is not None and compile_operators:
            apis.get_torchlib_ops = compile_operators
        if collects:
            gc.enable()


@functools.cache
def _operators(compile_operators: Callable[[], list[Any]]) -> list[Any]:
    return compile_operators()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter reports its progress with print, warnings and logs; ours is reported by the caller."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
