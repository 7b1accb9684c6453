"""The definition of every fused layer of `layer_table` as an ONNX model-local function, as in `function_bodies`.

A body holds the layer's products as nodes of `op_table`, whose own functions stand beside it in the file: a library
that knows the products and not the layers still runs them. Whether there are biases and inner norms differs between
models and not within one, so a file has the body that its nodes need.
"""

from __future__ import annotations

import onnx
import onnx.parser

from microvlm.exporters.contract import OPSET
from microvlm.formats.layer_table import (
    ATTENTION_OUTPUTS,
    EXPONENTIAL,
    LEAST_EXPONENT,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    MASK,
    MOST_EXPONENT,
    NORM_LANES,
    ROTATION,
    LayerSpec,
)
from microvlm.formats.op_table import DOMAIN, DOMAIN_VERSION

_SHARED = """
    last = Constant <value = int64[1] {-1}> ()
    one = Constant <value = float {1.0}> ()
"""
_NORM_SHARED = f"""
    lane_shape = Constant <value = int64[4] {{0, 0, -1, {NORM_LANES}}}> ()
    block_axis = Constant <value = int64 {{2}}> ()
    lane_axis = Constant <value = int64 {{3}}> ()
    lane_axes = Constant <value = int64[1] {{3}}> ()
    epsilon = Constant <value_float: float = @epsilon> ()
"""


def _norm(x: str, weight: str, y: str) -> str:
    """y = norm(x, weight). CumSum adds in order, where ReduceSum is free to add in any.

    The root is that of the inverse: ONNX Runtime makes one division of a product with an inverse.
    """
    return f"""
    {y}_squares = Mul ({x}, {x})
    {y}_blocks = Reshape ({y}_squares, lane_shape)
    {y}_block_sums = CumSum ({y}_blocks, block_axis)
    {y}_lanes = Gather <axis: int = 2> ({y}_block_sums, last)
    {y}_lane_sums = CumSum ({y}_lanes, lane_axis)
    {y}_totals = Gather <axis: int = 3> ({y}_lane_sums, last)
    {y}_total = Squeeze ({y}_totals, lane_axes)
    {y}_width = Shape <start: int = -1> ({x})
    {y}_count = Cast <to: int = 1> ({y}_width)
    {y}_mean = Div ({y}_total, {y}_count)
    {y}_above_zero = Add ({y}_mean, epsilon)
    {y}_inverse = Div (one, {y}_above_zero)
    {y}_factor = Sqrt ({y}_inverse)
    {y}_unweighted = Mul ({x}, {y}_factor)
    {y} = Mul ({y}_unweighted, {weight})
    """


def _product(layer: LayerSpec, x: str, name: str, y: str, rows: str) -> str:
    return f"""
    {y} = {DOMAIN}.{layer.product.name} <rows: int = @{rows}> ({x}, {name}_packed, {name}_scale)
    """


_ROTATION_SHARED = """
    half = Shape <start: int = -1> (cosine)
    head_begin = Constant <value = int64[4] {0, 0, -1, 2}> ()
    head_shape = Concat <axis: int = 0> (head_begin, half)
    flat_shape = Constant <value = int64[3] {0, 0, -1}> ()
    table_axes = Constant <value = int64[2] {2, 3}> ()
    cosines = Unsqueeze (cosine, table_axes)
    sines = Unsqueeze (sine, table_axes)
"""


def _rotation(x: str, y: str) -> str:
    return f"""
    {y}_heads = Reshape ({x}, head_shape)
    {y}_first, {y}_second = Split <axis: int = 3, num_outputs: int = 2> ({y}_heads)
    {y}_first_cosine = Mul ({y}_first, cosines)
    {y}_second_sine = Mul ({y}_second, sines)
    {y}_first_turned = Sub ({y}_first_cosine, {y}_second_sine)
    {y}_second_cosine = Mul ({y}_second, cosines)
    {y}_first_sine = Mul ({y}_first, sines)
    {y}_second_turned = Add ({y}_second_cosine, {y}_first_sine)
    {y}_turned = Concat <axis: int = 3> ({y}_first_turned, {y}_second_turned)
    {y} = Reshape ({y}_turned, flat_shape)
    """


def _attention_inputs(layer: LayerSpec, has: set[str]) -> str:
    text = [_SHARED, _NORM_SHARED, _ROTATION_SHARED, _norm("x", "norm", "hidden")]
    for name, rows in zip(ATTENTION_OUTPUTS, ("query_rows", "key_rows", "key_rows"), strict=True):
        is_rotated, has_bias = name != "value", f"{name}_bias" in has
        biased = f"{name}_flat" if is_rotated else name
        text.append(_product(layer, "hidden", name, f"{name}_product" if has_bias else biased, rows))
        if has_bias:
            text.append(f"{biased} = Add ({name}_product, {name}_bias)\n")
        if is_rotated:
            text.append(_rotation(biased, name))
    return "".join(text)


def _powers() -> str:
    """2^n at index n; an index below 0 counts from the end."""
    return ", ".join(repr(2.0 ** (n if n < 128 else max(n - 256, -126))) for n in range(256))


def _silu(x: str, y: str) -> str:
    """y = x / (1 + exp(-x)). A NaN of x is kept from the look-up, and comes back by the last division."""
    steps = []
    before = "p0"
    for i, coefficient in enumerate(EXPONENTIAL[1:], 1):
        steps += [
            f"c{i} = Constant <value = float {{{coefficient!r}}}> ()",
            f"p{i}_product = Mul ({before}, r)",
            f"p{i} = Add (p{i}_product, c{i})",
        ]
        before = f"p{i}"
    polynomial = "\n    ".join(steps)
    return f"""
    negative = Neg ({x})
    not_a_number = IsNaN (negative)
    zero = Constant <value = float {{0.0}}> ()
    number = Where (not_a_number, zero, negative)
    least = Constant <value = float {{{LEAST_EXPONENT!r}}}> ()
    most = Constant <value = float {{{MOST_EXPONENT!r}}}> ()
    exponent = Clip (number, least, most)
    log2_e = Constant <value = float {{{LOG2_E!r}}}> ()
    octaves = Mul (exponent, log2_e)
    n = Round (octaves)
    ln2_high = Constant <value = float {{{LN2_HIGH!r}}}> ()
    ln2_low = Constant <value = float {{{LN2_LOW!r}}}> ()
    high = Mul (n, ln2_high)
    low = Mul (n, ln2_low)
    r_high = Sub (exponent, high)
    r = Sub (r_high, low)
    p0 = Constant <value = float {{{EXPONENTIAL[0]!r}}}> ()
    {polynomial}
    r_squared = Mul (r, r)
    p_product = Mul ({before}, r_squared)
    p_sum = Add (p_product, r)
    mantissa = Add (p_sum, one)
    index = Cast <to: int = 7> (n)
    powers = Constant <value = float[256] {{{_powers()}}}> ()
    power = Gather (powers, index)
    exponential = Mul (mantissa, power)
    denominator = Add (one, exponential)
    {y} = Div ({x}, denominator)
    """


def _feed_forward(layer: LayerSpec, has: set[str]) -> str:
    def normalized(x: str, norm: str) -> tuple[str, str]:
        return (_norm(x, norm, f"{norm}_y"), f"{norm}_y") if norm in has else ("", x)

    before_out, mixed = normalized("mixed", "mixed_norm")
    before_down, inner = normalized("weighted", "inner_norm")
    return "".join(
        [
            _SHARED,
            _NORM_SHARED,
            before_out,
            _product(layer, mixed, "out", "out", "rows"),
            "between = Add (x, out)\n",
            _norm("between", "norm", "hidden"),
            _product(layer, "hidden", "gate", "gate", "inner_rows"),
            _silu("gate", "activated"),
            _product(layer, "hidden", "up", "up", "inner_rows"),
            "weighted = Mul (activated, up)\n",
            before_down,
            _product(layer, inner, "down", "down", "rows"),
            "y = Add (between, down)\n",
        ]
    )


def layer_function(layer: LayerSpec, present: set[str]) -> onnx.FunctionProto:
    """The body of a layer in domain `ai.microvlm`. `present`: the names of those inputs that are not empty."""
    body = (_attention_inputs if layer.outputs == ATTENTION_OUTPUTS else _feed_forward)(layer, present)
    inputs = ", ".join(operand.name for operand in layer.inputs)
    proto = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : {DOMAIN_VERSION}]>\n'
        f"{layer.name} <{', '.join((*layer.attributes, 'epsilon'))}> ({inputs}) => ({', '.join(layer.outputs)})"
        f" {{ {body} }}"
    )
    proto.doc_string = "the arithmetic and its order: microvlm/formats/layer_table.py"
    return proto


_MASK = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    row_axis = Constant <value = int64[1] {1}> ()
    batch_axes = Constant <value = int64[2] {1, 2}> ()
    total = Shape <start: int = 1> (attention_mask)
    queries = Shape <start: int = 1> (position_ids)
    key_count = Squeeze (total)
    query_count = Squeeze (queries)
    keys = Range (zero, key_count, one)
    steps = Range (zero, query_count, one)
    first = Sub (total, queries)
    own_flat = Add (steps, first)
    own = Unsqueeze (own_flat, row_axis)
    causal = LessOrEqual (keys, own)
    itself = Equal (keys, own)
    shown_flat = Cast <to: int = 9> (attention_mask)
    shown = Unsqueeze (shown_flat, batch_axes)
    seen = And (shown, causal)
    visible = Or (seen, itself)
"""


def mask_function() -> onnx.FunctionProto:
    """The body of `DecoderMask`."""
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{MASK} (attention_mask, position_ids) => (visible) {{ {_MASK} }}"
    )


def rotation_function(width: int) -> onnx.FunctionProto:
    """The body of `RotateBlocks` for blocks of `width` columns, which its nodes name in an attribute."""
    text = ["shape = Shape (x)\n", f"factor = Constant <value = float {{{width**-0.5!r}}}> ()\n"]
    current, stride = "x", 1
    while stride < width:
        sums = f"sums_{stride}"
        text.append(
            f"""
    pairs_shape_{stride} = Constant <value = int64[3] {{-1, 2, {stride}}}> ()
    pairs_{stride} = Reshape ({current}, pairs_shape_{stride})
    first_{stride}, second_{stride} = Split <axis: int = 1, num_outputs: int = 2> (pairs_{stride})
    upper_{stride} = Add (first_{stride}, second_{stride})
    lower_{stride} = Sub (first_{stride}, second_{stride})
    {sums} = Concat <axis: int = 1> (upper_{stride}, lower_{stride})
"""
        )
        current, stride = sums, 2 * stride
    text.append(f"scaled = Mul ({current}, factor)\ny = Reshape <allowzero: int = 1> (scaled, shape)\n")
    proto = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{ROTATION} <width> (x) => (y) {{ {"".join(text)} }}'
    )
    proto.doc_string = "the arithmetic and its order: microvlm/formats/layer_table.py"
    return proto
