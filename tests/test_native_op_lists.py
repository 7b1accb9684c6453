"""The operators named in the C++ sources are those of the table, with the same types, attributes and limits."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from microvlm.backends import native
from microvlm.formats import packing
from microvlm.formats.layer_table import EXPONENTIAL, LAYERS, LN2_HIGH, LN2_LOW, LOG2_E, MASK, NORM_LANES
from microvlm.formats.op_spec import ABSMAX_FLOOR, MAX_COLUMNS, Operand, OpSpec
from microvlm.formats.op_table import DOMAIN, MATMUL_BY_KIND, OPS

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "backends" / "native"
GLUE = NATIVE / "glue" / "ort_op.cpp"
DECLARATIONS = NATIVE / "declarations.h"
TYPES = {"kFloat": "float32", "kInt64": "int64", "kUint8": "uint8"}
ROW = re.compile(
    r'\{"(\w+)", Product::(\w+), (true|false), (?:"(\w+)"|nullptr), (k\w+),\n'
    r"     \{(\{.*?\}\})\}\},\n",
    re.S,
)
OPERAND = re.compile(r'\{"(\w+)", (\w+), \{([\w, ]+)\}\}')
INTERFACES = {2: "b3c65f55ef353e8ee886f9c89437ed0e5cc167a6414aefec05147670d52f669e"}
"""Number of an interface -> SHA-256 of the operators' declarations and of the C exports."""


def enumerator(kind: str) -> str:
    """The C++ `Product` of a storage kind: ternary2x4 is kTernary2x4."""
    return "k" + kind.capitalize()


def sizes_of(op: OpSpec, operand: Operand) -> tuple[str, ...]:
    """The `Size` of each dimension of an operand, from the table's text such as "[N, G = Kp / 32]"."""
    text = operand.shape.translate(str.maketrans({"V": "N", "H": "K"}))
    sizes = {
        "...": "kLeading",
        "K": "kColumns",
        "N": "kRows",
        f"R = ceil(N / {op.rows_per_byte})": "kPackedRows",
        "S": "kOneOrRows",
        f"G = Kp / {op.group}": "kGroups",
        f"Kp / {op.columns_per_byte}": "kGroupBytes",
    }
    names = tuple(sizes[part] for part in text.strip("[]").split(", "))
    # One scale broadcasts in every product's function body: kernels take it where the table stores one a row, too.
    return ("kOneOrRows",) if operand.name == "scale" and not op.is_lookup else names


def test_the_glue_declares_every_operator_as_the_table_does() -> None:
    rows = ROW.findall(DECLARATIONS.read_text())
    declared = {
        name: (product, gathers == "true", (attribute,) if attribute else (), attribute_size, operands)
        for name, product, gathers, attribute, attribute_size, operands in rows
    }
    attribute_sizes = {(): "kNone", ("rows",): "kRows", ("columns",): "kColumns"}
    assert list(declared) == list(OPS)
    for op in OPS.values():
        product, gathers, attributes, attribute_size, operands = declared[op.name]
        assert (product, gathers, attributes) == (enumerator(op.kind), op.is_lookup, op.attributes)
        assert attribute_size == attribute_sizes[op.attributes]
        assert [
            (name, TYPES[type_name], tuple(sizes.split(", ")))
            for name, type_name, sizes in OPERAND.findall(operands)
        ] == [(operand.name, operand.dtype, sizes_of(op, operand)) for operand in op.inputs]


def test_a_changed_declaration_or_export_has_another_number() -> None:
    """A library of another version is told by its number: count `kInterface` and `INTERFACE` up, note the hash."""
    exports = NATIVE / "c_api.cpp"
    (number,) = re.findall(r"kInterface = (\d+);", exports.read_text())
    assert int(number) == native.INTERFACE
    prototypes = re.findall(r"^MICROVLM_EXPORT .*?\) \{", exports.read_text(), re.M | re.S)
    text = [row.group() for row in ROW.finditer(DECLARATIONS.read_text())] + prototypes
    words = " ".join("".join(text).split())
    assert hashlib.sha256(words.encode()).hexdigest() == INTERFACES[native.INTERFACE]


def test_the_glue_registers_the_domain_of_the_table() -> None:
    assert re.findall(r'<kCreateCustomOpDomain>\(api, "([^"]+)"', GLUE.read_text()) == [DOMAIN]


def test_the_counted_products_have_the_names_of_the_table_in_the_order_of_the_enumeration() -> None:
    source = ROOT / "bench" / "pi" / "counting" / "sources" / "one_product.cpp"
    (listed,) = re.findall(r"kNames\[\] = \{([^}]+)\}", source.read_text())
    (enumeration,) = re.findall(r"enum class Product \{([^}]+)\}", (NATIVE / "operators.h").read_text())
    products = {enumerator(op.kind): op.name for op in MATMUL_BY_KIND.values()}
    assert re.findall(r'"(\w+)"', listed) == [products[name] for name in re.findall(r"\w+", enumeration)]


def test_every_product_has_the_table_s_rows_in_a_byte() -> None:
    (body,) = re.findall(
        r"int planes_of\(Product product\) \{(.*?)\}", (NATIVE / "operators.cpp").read_text()
    )
    planes = {name: int(count) for name, count in re.findall(r"Product::(\w+) \? (\d+)", body)}
    packed = [op for op in MATMUL_BY_KIND.values() if op.rows_per_byte > 1]
    assert planes == {enumerator(op.kind): op.rows_per_byte for op in packed}
    assert body.rstrip().endswith(": 1;")


def test_the_kernels_have_the_table_s_limits() -> None:
    header = (NATIVE / "kernels.h").read_text()
    constants = dict(re.findall(r"constexpr \w+ (k\w+) = ([\w.+-]+?)f?;", header))
    assert int(constants["kMaxColumns"]) == MAX_COLUMNS
    assert int(constants["kInt4MaxColumns"]) == packing.INT4_MAX_COLUMNS
    assert int(constants["kGroup"]) == packing.GROUP
    (floor,) = (value for name, value in constants.items() if name.endswith("Floor"))
    assert float(floor) == pytest.approx(float(ABSMAX_FLOOR))
    assert {op.max_columns for op in MATMUL_BY_KIND.values()} == {MAX_COLUMNS, packing.INT4_MAX_COLUMNS}


def test_the_fused_layers_are_declared_as_their_table_has_them() -> None:
    text = (NATIVE / "layers" / "layer_declarations.h").read_text()
    macros = dict(re.findall(r"#define (MICROVLM_\w+) \\\n((?:.*\\\n)*.*)\n", text))
    rows = re.findall(
        r'\{"(\w+)", Product::(\w+), (true|false), (\d), (\d), \{"(\w+)", "(\w+)"\}, (\w+)\}', text
    )
    assert [row[0] for row in rows] == list(LAYERS)
    for name, product, is_feed_forward, activations, outputs, first, second, macro in rows:
        layer = LAYERS[name]
        assert product == enumerator(layer.product.kind)
        assert (is_feed_forward == "true") == (layer.outputs == ("y",))
        assert (int(activations), int(outputs)) == (len(layer.activations), len(layer.outputs))
        assert (first, second) == layer.attributes
        operands = re.sub(
            r'MICROVLM_MATRIX\("(\w+)"\)',
            r'{"\1_packed", kUint8, {}}, {"\1_scale", kFloat, {}}',
            macros[macro],
        )
        declared = [(name, TYPES[kind]) for name, kind in re.findall(r'\{"(\w+)", (k\w+), \{', operands)]
        assert declared == [(operand.name, operand.dtype) for operand in layer.inputs]
    (lanes,) = re.findall(r"kNormLanes = (\d+);", (NATIVE / "kernels.h").read_text())
    assert int(lanes) == NORM_LANES
    steps = (NATIVE / "layers" / "float_steps.h").read_text()
    numbers = {np.float32(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", steps)}
    assert {np.float32(constant) for constant in (*EXPONENTIAL, LOG2_E, LN2_HIGH, LN2_LOW)} <= numbers
    assert f'"{MASK}"' in (NATIVE / "glue" / "ort_mask.cpp").read_text()
