"""The light clean-up of a traced graph: arithmetic on constants folded, repeats and dead nodes dropped.

torch's own optimizer is not used because it folds and renames small weights; a bundle's initializers are the model.
"""

from __future__ import annotations

import logging

import onnx_ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from microvlm.exporters.fusion.attention_fusion import fuse_attention
from microvlm.exporters.fusion.layer_fusion import fuse_layers
from microvlm.formats.layer_table import LAYERS
from microvlm.formats.op_table import DOMAIN

FOLD_BELOW_ELEMENTS = 4096
"""Constants of shapes, masks and frequencies are far below this."""
WHOLE = 2**63 - 1
"""The end of a Slice that goes to the end."""


def tidy(model: onnx_ir.Model, weights: set[str], prefix: str, fuses: bool = True) -> None:
    """Cleans up in place; without `fuses` products stay
    nodes of their own. Initializers lose the wrapper's `prefix`; those not in `weights` become Constant nodes."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        assert value.name is not None
        value.name = value.name.removeprefix(prefix)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    fold_constants(
        model,
        input_size_limit=FOLD_BELOW_ELEMENTS,
        output_size_limit=FOLD_BELOW_ELEMENTS,
        should_fold=lambda node: False if _reads(node, weights) else None,
    )
    _spell_constants_as_nodes(graph, weights)
    _drop_whole_slices(graph)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    fuse_attention(graph)
    if fuses:
        fuse_layers(graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    _forget_shapes(graph)


def _reads(node: onnx_ir.Node, weights: set[str]) -> bool:
    return any(value is not None and value.name in weights for value in node.inputs)


def _spell_constants_as_nodes(graph: onnx_ir.Graph, weights: set[str]) -> None:
    """One Constant node for each distinct value that is not a weight, before the first node."""
    constants_by_value: dict[tuple, onnx_ir.Value] = {}
    names = [name for name in graph.initializers if name not in weights]
    constants = [graph.initializers[name] for name in names]
    nodes = [node for node in graph if node.op_type == "Constant" and node.domain == ""]
    for old in [*constants, *(node.outputs[0] for node in nodes)]:
        tensor = onnx_ir.convenience.get_const_tensor(old)
        assert tensor is not None
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if key not in constants_by_value:
            copy = onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
            node = onnx_ir.node("Constant", [], {"value": copy})
            node.outputs[0].name = f"constant_{len(constants_by_value)}"
            graph.insert_before(graph[0], node)
            constants_by_value[key] = node.outputs[0]
        old.replace_all_uses_with(constants_by_value[key], replace_graph_outputs=True)
    for name in names:
        del graph.initializers[name]


def _drop_whole_slices(graph: onnx_ir.Graph) -> None:
    """x[:, None] leaves Slices from 0 to the end by 1, which change nothing."""
    for node in graph:
        if node.op_type != "Slice" or node.domain or len(node.inputs) != 5:
            continue
        source, *bounds = [value for value in node.inputs if value is not None]
        begin, end, _, step = (onnx_ir.convenience.get_const_tensor(value) for value in bounds)
        if begin is None or end is None or step is None:
            continue
        if (begin.numpy() == 0).all() and (end.numpy() == WHOLE).all() and (step.numpy() == 1).all():
            node.outputs[0].replace_all_uses_with(source)


def _forget_shapes(graph: onnx_ir.Graph) -> None:
    """Drop the tracer's shapes of inner values: they name symbols that the contract does not have.

    The width of attention's values stays where it comes out of a function without a bias: ONNX cannot tell it there,
    infers outputs of width 0, and refuses the norm that follows.
    """
    untold = {
        node.inputs[2]
        for node in graph
        if node.op_type == "Attention" and node.domain == "" and _is_untold(node.inputs[2])
    }
    for node in graph:
        for value in node.outputs:
            if value in untold and value.shape is not None:
                value.shape = onnx_ir.Shape([None, None, value.shape[-1]])
            elif not value.is_graph_output():
                value.shape = None
                value.type = None


def _is_untold(value: onnx_ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.domain != DOMAIN:
        return False
    bias = node.inputs[-1] if node.op_type in LAYERS else None
    return bias is None or not bias.is_initializer()
