"""A decoder that programs for text models run: token ids in, logits out, and a key-value cache without the memory slot.

It is made from a bundle's saved graphs `embed_tokens`, `decoder_model_merged` and `memory_encode`, whose nodes, weights
and names stay as they are. Around them:

- `past_key_values` get the slot in front and `present` lose it again, and positions move by one;
- an image token of a prompt becomes the next row of `image_features`;
- with `encode_memory` the first run also returns the prompt's `memory_code` and `memory_key`.

A decoder for text alone has no picture and a masked slot as constants. They cannot be inputs with defaults: ONNX
Runtime has such inputs, and onnxruntime-genai passes none that the session does not require.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from microvlm.config import MicroVLMConfig
from microvlm.exporters.contract import OPSET, kv_names
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION

EMBED, DECODE, ENCODE = "embed_tokens", "decoder_model_merged", "memory_encode"
_WHOLE = 2**63 - 1
_GLUE = """
    <ir_version: 10, opset_import: ["" : %d]>
    glue (int64[batch, sequence] input_ids, float[batch, sequence, width] token_embeds) => () {
        one_axis = Constant <value = int64[1] {1}> ()
        batch_size = Shape <start: int = 0, end: int = 1> (input_ids)
        length = Shape <start: int = 1, end: int = 2> (input_ids)
        is_mark = Equal (input_ids, image_token)
        is_prompt = Greater (length, one_axis)
        is_image = And (is_mark, is_prompt)
        any_rows = Constant <value = int64[1] {-1}> ()
        flat_marks = Reshape (is_image, any_rows)
        counted = Cast <to: int = 7> (flat_marks)
        first_axis = Constant <value = int64 {0}> ()
        numbers = CumSum (counted, first_axis)
        one = Constant <value = int64 {1}> ()
        numbers_from_0 = Sub (numbers, one)
        width_of_token = Shape <start: int = 2> (token_embeds)
        flat_shape = Concat <axis: int = 0> (any_rows, width_of_token)
        feature_rows = Reshape (image_features, flat_shape)
        rows = Shape <start: int = 0, end: int = 1> (feature_rows)
        last_row = Sub (rows, one_axis)
        zero_row = Constant <value = int64[1] {0}> ()
        not_before = Max (numbers_from_0, zero_row)
        number = Min (not_before, last_row)
        picked = Gather <axis: int = 0> (feature_rows, number)
        shape_of_embeds = Shape (token_embeds)
        features = Reshape (picked, shape_of_embeds)
        is_image_row = Unsqueeze (is_image, any_rows)
        inputs_embeds = Where (is_image_row, features, token_embeds)
        slot_mask_shape = Concat <axis: int = 0> (batch_size, one_axis)
        slot_mask = Expand (memory_visible, slot_mask_shape)
        slot_and_mask = Concat <axis: int = 1> (slot_mask, attention_mask)
        moved_positions = Add (position_ids, one)
    }
"""


def text_decoder(
    config: MicroVLMConfig, image_token: int, graphs: Mapping[str, ModelProto], *, text_only: bool
) -> ModelProto:
    """The fused model; it refers to the same data files as `graphs`, which are the saved ones by their names.

    image_token : id of the token that stands for a prefix embedding.
    text_only : `logits` [B, S, V] of text. Else also inputs for pictures (`image_features` [images, k, H]) and the
        memory slot (`memory_visible` [B or 1, 1], `memory_kv.N.key` and `.value` [B or 1, heads, 1, D]); `logits`
        [B, 1, V] are the last position's, and with `encode_memory` [1] there are `memory_code` [B, C] and `memory_key`
        [B, K].
    """
    text, memory = config.text, config.memory
    layers, heads, size = text.num_hidden_layers, text.num_key_value_heads, text.head_dim
    past, present, slot = (kv_names(name, layers) for name in ("past_key_values", "present", "memory_kv"))
    glue = onnx.parser.parse_model(_GLUE % OPSET).graph
    embed, decode = graphs[EMBED].graph, graphs[DECODE].graph
    nodes = [*_renamed(embed, {"inputs_embeds": "token_embeds"}), *glue.node]
    nodes += [_keep(not text_only)]
    with_slot = {name: f"{name}.with_slot" for name in (*past, *present)}
    moved = {"attention_mask": "slot_and_mask", "position_ids": "moved_positions", **with_slot}
    heads_shape = f"[{heads}, 1, {size}]"
    nodes += [
        helper.make_node("Constant", [], ["slot_shape"], value_ints=[heads, 1, size], doc_string=heads_shape),
        helper.make_node("Concat", ["batch_size", "slot_shape"], ["batch_slot_shape"], axis=0),
        helper.make_node("Constant", [], ["after_slot"], value_ints=[1]),
        helper.make_node("Constant", [], ["to_the_end"], value_ints=[_WHOLE]),
        helper.make_node("Constant", [], ["positions_axis"], value_ints=[2]),
    ]
    for source, name in zip(past, slot, strict=True):
        nodes.append(helper.make_node("Expand", [name, "batch_slot_shape"], [f"{name}.rows"]))
        nodes.append(helper.make_node("Concat", [f"{name}.rows", source], [with_slot[source]], axis=2))
    nodes += _renamed(decode, moved)
    for name in present:
        bounds = ["after_slot", "to_the_end", "positions_axis"]
        nodes.append(helper.make_node("Slice", [with_slot[name], *bounds], [name]))
    cache = ("batch", heads, "past", size)
    inputs = [
        _tensor("input_ids", TensorProto.INT64, ("batch", "sequence")),
        _tensor("attention_mask", TensorProto.INT64, ("batch", "past + sequence")),
        _tensor("position_ids", TensorProto.INT64, ("batch", "sequence")),
        *(_tensor(name, TensorProto.FLOAT, cache) for name in past),
    ]
    features = np.zeros((1, config.prefix_tokens, text.hidden_size), np.float32)
    defaults: dict[str, tuple[np.ndarray, tuple[int | str, ...]]] = {
        "image_features": (features, ("images", config.prefix_tokens, text.hidden_size)),
        "memory_visible": (np.zeros((1, 1), np.int64), ("rows", 1)),
        **{name: (np.zeros((1, heads, 1, size), np.float32), ("rows", heads, 1, size)) for name in slot},
    }
    kept = "sequence" if text_only else 1
    outputs = [
        _tensor("logits", TensorProto.FLOAT, ("batch", kept, text.vocab_size)),
        *(_tensor(name, TensorProto.FLOAT, ("batch", heads, "past + sequence", size)) for name in present),
    ]
    used = [EMBED, DECODE]
    if not text_only:
        used.append(ENCODE)
        sizes = {"memory_code": memory.code_size, "memory_key": memory.slots}
        nodes += _memory_nodes(graphs[ENCODE].graph, past[0], sizes)
        defaults["encode_memory"] = (np.zeros(1, np.int64), (1,))
        outputs += [_tensor(name, TensorProto.FLOAT, ("rows", width)) for name, width in sizes.items()]
        inputs += [
            _tensor(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)
            for name, (value, shape) in defaults.items()
        ]
        defaults = {}
    weights = {tensor.name: tensor for graph in used for tensor in graphs[graph].graph.initializer}
    constants = [_constant(np.array(image_token), "image_token")]
    constants += [_constant(value, name) for name, (value, _) in defaults.items()]
    graph = helper.make_graph(nodes, "text_decoder", inputs, outputs, [*weights.values(), *constants])
    functions = {function.name: function for name in used for function in graphs[name].functions}
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    ir_version = graphs[DECODE].ir_version
    return helper.make_model(
        graph, opset_imports=opsets, functions=list(functions.values()), ir_version=ir_version
    )


def _keep(last: bool) -> NodeProto:
    if last:
        return helper.make_node("Constant", [], ["num_logits_to_keep"], value_int=1)
    return helper.make_node("Squeeze", ["length"], ["num_logits_to_keep"])


def _memory_nodes(encode: GraphProto, cache: str, sizes: Mapping[str, int]) -> list[NodeProto]:
    """`memory_code` and `memory_key` of the prompt, [0, C] and [0, K] where they are not asked for.

    Only in the first run, which has the whole prompt: `cache` has no positions then.
    """
    inner = {value: f"memory.{value}" for node in encode.node for value in node.output}
    then = helper.make_graph(
        _renamed(encode, inner),
        "encode_memory",
        [],
        [_tensor(f"memory.{name}", TensorProto.FLOAT, ("batch", width)) for name, width in sizes.items()],
    )
    nothing = [
        helper.make_node("Constant", [], [f"no.{name}"], value=_constant(np.zeros((0, width), np.float32)))
        for name, width in sizes.items()
    ]
    outputs = [_tensor(f"no.{name}", TensorProto.FLOAT, (0, width)) for name, width in sizes.items()]
    otherwise = helper.make_graph(nothing, "no_memory", [], outputs)
    return [
        helper.make_node("Shape", [cache], ["past_length"], start=2, end=3),
        helper.make_node("Equal", ["past_length", "zero_row"], ["is_first_run"]),
        helper.make_node("Cast", ["encode_memory"], ["is_wanted"], to=TensorProto.BOOL),
        helper.make_node("And", ["is_first_run", "is_wanted"], ["encodes"]),
        helper.make_node("If", ["encodes"], list(sizes), then_branch=then, else_branch=otherwise),
    ]


def _renamed(graph: GraphProto, names: Mapping[str, str]) -> list[NodeProto]:
    """The graph's nodes with values of other names."""
    nodes = []
    for node in graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names.get(name, name) for name in node.output]
        nodes.append(copy)
    return nodes


def _constant(value: np.ndarray, name: str = "") -> TensorProto:
    return numpy_helper.from_array(value, name)


def _tensor(name: str, dtype: int, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)
