"""The definition of every `op_table` operator as an ONNX model-local function: stock ONNX Runtime can run a bundle.

Each body is standard ONNX, sums integers exactly and keeps the table's float order bit for bit. Three details serve
the machine and not the mathematics:

- Weights are the first operand of MatMulInteger, as they lie in the file: nothing is transposed or copied at load.
- Unpacked weights would be folded into constants at load, four to five times the packed bytes and more. `zero` is a
  0 that depends on the input; as part of the shift or the divisor it keeps the unpacking inside each call.
- On x86 without VNNI, uint8 x int8 products are added in pairs in 16 bits, saturating. Trits (0..2) and nibbles
  (0..15) never saturate; full bytes do, so `Int8MatMul` takes activations as uint8 too, which are widened first.

Names of values inside the bodies are part of the bundle format and keep their old words: `codes` are activations_q8
or trit_codes, `peak` is absmax, `step` is activation_scale.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx.parser
from onnx import helper

from microvlm.exporters.contract import OPSET
from microvlm.exporters.fusion.layer_bodies import layer_function, mask_function, rotation_function
from microvlm.formats.layer_table import LAYERS, MASK, ROTATION
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import DOMAIN, OPS
from microvlm.formats.packing import GROUP, TernaryLayout

CHUNK_ROWS = 4096
"""Rows of an int4 table that are unpacked at a time."""

# x [..., K] -> lead, the leading dimensions; step [M, 1]; clipped [M, K], activations_q8 as floats.
# `blank` is a token's 0, or NaN when a value of it is NaN or infinite: then the scale is NaN and activations_q8 are 0,
# because ONNX does not define what ReduceMax, Max and Cast make of a NaN.
_QUANTIZE = """
    lead = Shape <start: int = 0, end: int = -1> (x)
    width = Shape <start: int = -1> (x)
    any_rows = Constant <value = int64[1] {-1}> ()
    flat_shape = Concat <axis: int = 0> (any_rows, width)
    flat = Reshape (x, flat_shape)
    magnitude = Abs (flat)
    columns_axis = Constant <value = int64[1] {1}> ()
    raw_peak = ReduceMax <keepdims: int = 1> (magnitude, columns_axis)
    peak_floor = Constant <value = float {1e-5}> ()
    peak = Max (raw_peak, peak_floor)
    code_min = Constant <value = float {-128.0}> ()
    code_max = Constant <value = float {127.0}> ()
    inverse_step = Div (code_max, peak)
    scaled = Mul (flat, inverse_step)
    rounded = Round (scaled)
    limited = Clip (rounded, code_min, code_max)
    nothing = Sub (flat, flat)
    blank = ReduceSum <keepdims: int = 1> (nothing, columns_axis)
    not_finite = IsNaN (blank)
    no_code = Constant <value = float {0.0}> ()
    clipped = Where (not_finite, no_code, limited)
    finite_step = Div (peak, code_max)
    step = Where (not_finite, blank, finite_step)
"""

_SIGNED_ACTIVATIONS = """
    codes = Cast <to: int = 3> (clipped)
    codes_t = Transpose <perm: ints = [1, 0]> (codes)
"""

# 0 as uint8, from a dimension that is only known when the model runs.
_ZERO = """
    one_dim = Shape <start: int = 0, end: int = 1> (OPERAND)
    none = Constant <value = int64[1] {0}> ()
    no_dim = Mul (one_dim, none)
    zero = Cast <to: int = 2> (no_dim)
"""

# sums int32 [N, M] -> y [..., N]
_SCALE = """
    sums_t = Transpose <perm: ints = [1, 0]> (sums)
    acc = Cast <to: int = 1> (sums_t)
    factor = Mul (step, scale)
    y_flat = Mul (acc, factor)
    n = Shape <start: int = 1> (y_flat)
    y_shape = Concat <axis: int = 0> (lead, n)
    y = Reshape (y_flat, y_shape)
"""


def _planes_by_shift(shifts: list[int], mask: int) -> str:
    """Trit codes of plane p in bits of their own: codes_p = (packed >> shifts[p]) & mask."""
    lines = [f"mask = Constant <value = uint8 {{{mask}}}> ()"]
    for p, shift in enumerate(shifts):
        lines += [
            f"shift{p}_constant = Constant <value = uint8 {{{shift}}}> ()",
            f"shift{p} = BitwiseOr (shift{p}_constant, zero)",
            f'shifted{p} = BitShift <direction: string = "RIGHT"> (packed, shift{p})',
            f"codes{p} = BitwiseAnd (shifted{p}, mask)",
        ]
    return "\n".join(lines)


def _planes_by_division(base: int, count: int) -> str:
    """Trit codes of plane p as digit p: codes_p = rest_p - base (rest_p / base), rest_{p+1} = rest_p / base."""
    last = count - 1
    lines = [
        f"base_constant = Constant <value = uint8 {{{base}}}> ()",
        "base = BitwiseOr (base_constant, zero)",
        "rest0 = BitwiseOr (packed, zero)",
    ]
    for p in range(last):
        lines += [
            f"rest{p + 1} = Div (rest{p}, base)",
            f"thrice{p} = Mul (rest{p + 1}, base)",
            f"codes{p} = Sub (rest{p}, thrice{p})",
        ]
    return "\n".join([*lines, f"codes{last} = Identity (rest{last})"])


def _planes(layout: TernaryLayout) -> str:
    """The planes of a layout: by shifts where its base is a power of two."""
    base, count = layout
    width = base.bit_length() - 1
    if base == 1 << width:
        return _planes_by_shift([width * p for p in range(count)], base - 1)
    return _planes_by_division(base, count)


def _ternary_body(planes: str, count: int) -> str:
    """`planes` defines codes0, codes1, ... uint8 [R, K] of 0, 1, 2; plane p holds rows p R .. (p + 1) R."""
    products = "\n".join(f"sums{p} = MatMulInteger (codes{p}, codes_t, one)" for p in range(count))
    names = ", ".join(f"sums{p}" for p in range(count))
    return f"""{_QUANTIZE}{_SIGNED_ACTIVATIONS}{_zero("x")}
    one = Constant <value = uint8 {{1}}> ()
    {planes}
    {products}
    padded = Concat <axis: int = 0> ({names})
    begin = Constant <value = int64[1] {{0}}> ()
    row_count = Constant <value_int: int = @rows> ()
    stop = Reshape (row_count, any_rows)
    sums = Slice (padded, begin, stop, begin)
    {_SCALE}"""


def _zero(operand: str) -> str:
    return _ZERO.replace("OPERAND", operand)


_INT8_MATMUL = f"""{_QUANTIZE}
    offset = Constant <value = float {{128.0}}> ()
    shifted = Add (clipped, offset)
    codes = Cast <to: int = 2> (shifted)
    codes_t = Transpose <perm: ints = [1, 0]> (codes)
    zero_point = Constant <value = uint8 {{128}}> ()
    sums = MatMulInteger (packed, codes_t, zero_point, zero_point)
    {_SCALE}"""

# Activations become [G, 32, M], a group's even columns before its odd ones, as low and high nibbles lie in a chunk.
# The last chunk ends at row N and so overlaps the one before; `head` drops what it repeats. A slice that depends on
# the loop's counter cannot be folded, so no `zero` is needed.
_INT4_MATMUL = f"""{_QUANTIZE}
    codes = Cast <to: int = 3> (clipped)
    axis0 = Constant <value = int64[1] {{0}}> ()
    axis1 = Constant <value = int64[1] {{1}}> ()
    rows = Shape <start: int = 0, end: int = 1> (multiplier)
    groups = Shape <start: int = 1, end: int = 2> (multiplier)
    group_width = Constant <value = int64[1] {{{GROUP}}}> ()
    padded_width = Mul (groups, group_width)
    missing = Sub (padded_width, width)
    no_pads = Constant <value = int64[3] {{0, 0, 0}}> ()
    pads = Concat <axis: int = 0> (no_pads, missing)
    padded = Pad (codes, pads)
    pair_shape = Constant <value = int64[4] {{0, -1, {GROUP // 2}, 2}}> ()
    pairs = Reshape (padded, pair_shape)
    pairs_t = Transpose <perm: ints = [1, 3, 2, 0]> (pairs)
    group_shape = Constant <value = int64[3] {{0, {GROUP}, -1}}> ()
    group_codes = Reshape (pairs_t, group_shape)
    most_rows = Constant <value = int64[1] {{{CHUNK_ROWS}}}> ()
    chunk_rows = Min (rows, most_rows)
    last_begin = Sub (rows, chunk_rows)
    ahead = Sub (chunk_rows, axis1)
    rows_up = Add (rows, ahead)
    chunks = Div (rows_up, chunk_rows)
    minus_axis = Constant <value = int64[1] {{-1}}> ()
    trips = Squeeze (chunks, axis0)
    always = Constant <value = bool {{1}}> ()
    byte_shape = Constant <value = int64[3] {{0, -1, {GROUP // 2}}}> ()
    mask = Constant <value = uint8 {{15}}> ()
    four = Constant <value = uint8 {{4}}> ()
    zero_point = Constant <value = uint8 {{8}}> ()
    stacked = Loop <body = chunk_body (int64 trip, bool go) => (bool go_on, int32[chunk, tokens] chunk_sums) {{
        go_on = Identity (go)
        wanted_begin = Mul (chunk_rows, trip)
        begin = Min (wanted_begin, last_begin)
        end = Add (begin, chunk_rows)
        bytes = Slice (packed, begin, end, axis0)
        by_group = Reshape (bytes, byte_shape)
        group_bytes = Transpose <perm: ints = [1, 0, 2]> (by_group)
        low = BitwiseAnd (group_bytes, mask)
        high = BitShift <direction: string = "RIGHT"> (group_bytes, four)
        nibbles = Concat <axis: int = -1> (low, high)
        group_sums = MatMulInteger (nibbles, group_codes, zero_point)
        multipliers = Slice (multiplier, begin, end, axis0)
        wide_multipliers = Cast <to: int = 6> (multipliers)
        multipliers_t = Transpose <perm: ints = [1, 0]> (wide_multipliers)
        factors = Unsqueeze (multipliers_t, minus_axis)
        weighted = Mul (group_sums, factors)
        chunk_sums = ReduceSum <keepdims: int = 0> (weighted, axis0)
    }}> (trips, always)
    flat_sums = Flatten <axis: int = 2> (stacked)
    full = Sub (chunks, axis1)
    full_rows = Mul (full, chunk_rows)
    tail_rows = Sub (full_rows, rows)
    head = Slice (flat_sums, axis0, full_rows, axis0)
    far = Constant <value = int64[1] {{9223372036854775807}}> ()
    tail = Slice (flat_sums, tail_rows, far, axis0)
    sums = Concat <axis: int = 0> (head, tail)
    {_SCALE}"""

_FLAT_IDS = """
    lead = Shape (input_ids)
    any_rows = Constant <value = int64[1] {-1}> ()
    ids = Reshape (input_ids, any_rows)
    row_bytes = Gather <axis: int = 0> (packed, ids)
    row_scale = Gather <axis: int = 0> (scale, ids)
    columns_axis = Constant <value = int64[1] {1}> ()
    column_scale = Unsqueeze (row_scale, columns_axis)
"""

_INT8_GATHER = f"""{_FLAT_IDS}
    offset = Constant <value = float {{128.0}}> ()
    wide = Cast <to: int = 1> (row_bytes)
    weights = Sub (wide, offset)
    y_flat = Mul (weights, column_scale)
    h = Shape <start: int = 1> (y_flat)
    y_shape = Concat <axis: int = 0> (lead, h)
    y = Reshape (y_flat, y_shape)
"""

_INT4_GATHER = f"""{_FLAT_IDS}
    mask = Constant <value = uint8 {{15}}> ()
    four = Constant <value = uint8 {{4}}> ()
    eight = Constant <value = int32 {{8}}> ()
    last_axis = Constant <value = int64[1] {{-1}}> ()
    low = BitwiseAnd (row_bytes, mask)
    high = BitShift <direction: string = "RIGHT"> (row_bytes, four)
    low_1 = Unsqueeze (low, last_axis)
    high_1 = Unsqueeze (high, last_axis)
    pairs = Concat <axis: int = -1> (low_1, high_1)
    group_shape = Constant <value = int64[3] {{0, -1, {GROUP}}}> ()
    nibbles = Reshape (pairs, group_shape)
    wide = Cast <to: int = 6> (nibbles)
    q = Sub (wide, eight)
    row_multiplier = Gather <axis: int = 0> (multiplier, ids)
    wide_multiplier = Cast <to: int = 6> (row_multiplier)
    factors = Unsqueeze (wide_multiplier, last_axis)
    integers = Mul (q, factors)
    padded = Flatten <axis: int = 1> (integers)
    begin = Constant <value = int64[1] {{0}}> ()
    column_count = Constant <value_int: int = @columns> ()
    stop = Reshape (column_count, any_rows)
    kept = Slice (padded, begin, stop, columns_axis)
    weights = Cast <to: int = 1> (kept)
    y_flat = Mul (weights, column_scale)
    h = Shape <start: int = 1> (y_flat)
    y_shape = Concat <axis: int = 0> (lead, h)
    y = Reshape (y_flat, y_shape)
"""

BODIES: dict[str, str] = {
    "Int8MatMul": _INT8_MATMUL,
    "Int4MatMul": _INT4_MATMUL,
    "Int8Gather": _INT8_GATHER,
    "Int4Gather": _INT4_GATHER,
}
"""Operator name -> its body. Ternary planes (`OpSpec.trit_layout`) need no entry."""


def _body(op: OpSpec) -> str:
    if op.trit_layout is not None:
        return _ternary_body(_planes(op.trit_layout), op.trit_layout.rows_per_byte)
    return BODIES[op.name]


def function(op: OpSpec) -> onnx.FunctionProto:
    """The body of one operator, in domain `ai.microvlm`, over the standard operators of `OPSET`."""
    attributes = f"<{', '.join(op.attributes)}>" if op.attributes else ""
    inputs = ", ".join(operand.name for operand in op.inputs)
    proto = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{op.name} {attributes} ({inputs}) => ({op.output.name}) {{ {_body(op)} }}"
    )
    proto.doc_string = f"{op.layout}; {op.float_order}"
    return proto


def functions_for(nodes: Collection[onnx.NodeProto]) -> list[onnx.FunctionProto]:
    """The bodies of a graph's operators and fused layers, in the tables' order; products in layers have theirs too."""
    empty = {node.output[0] for node in nodes if node.op_type == "Constant" and _is_empty(node)}
    present: dict[str, set[str]] = {}
    for node in nodes:
        if node.domain == DOMAIN:
            names = (
                [operand.name for operand in LAYERS[node.op_type].inputs] if node.op_type in LAYERS else []
            )
            present[node.op_type] = {
                name for name, value in zip(names, node.input, strict=False) if value not in empty
            }
    layers = [layer for name, layer in LAYERS.items() if name in present]
    masks = [mask_function()] if MASK in present else []
    widths = {
        helper.get_node_attr_value(node, "width")
        for node in nodes
        if (node.domain, node.op_type) == (DOMAIN, ROTATION)
    }
    assert len(widths) <= 1, "a function has one body, and so one width"
    op_types = present.keys() | {layer.product.name for layer in layers}
    return [
        *(function(op) for name, op in OPS.items() if name in op_types),
        *(layer_function(layer, present[layer.name]) for layer in layers),
        *masks,
        *map(rotation_function, sorted(widths)),
    ]


def _is_empty(node: onnx.NodeProto) -> bool:
    return any(0 in attribute.t.dims for attribute in node.attribute if attribute.name == "value")
