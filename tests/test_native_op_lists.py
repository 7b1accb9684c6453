"""The operators named in the C++ sources are those of the table, with the same types, attributes and limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from microvlm.formats import packing
from microvlm.formats.op_spec import ABSMAX_FLOOR, MAX_COLUMNS
from microvlm.formats.op_table import DOMAIN, MATMUL_BY_KIND, OPS

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "backends" / "native"
GLUE = NATIVE / "glue" / "ort_op.cpp"
MAKE_OP = re.compile(
    r'make_op\("(\w+)",\s*(kFloat|kInt64),\s*(true|false),\s*(?:"(\w+)"|nullptr),\s*Product::(\w+)\)'
)
FIRST_TYPES = {"kFloat": "float32", "kInt64": "int64"}


def enumerator(kind: str) -> str:
    """The C++ `Product` of a storage kind: ternary2x4 is kTernary2x4."""
    return "k" + kind.capitalize()


def test_the_glue_declares_every_operator_as_the_table_does() -> None:
    declared = {
        name: (FIRST_TYPES[first_type], has_multiplier == "true", (attribute,) if attribute else (), product)
        for name, first_type, has_multiplier, attribute, product in MAKE_OP.findall(GLUE.read_text())
    }
    assert declared == {
        op.name: (op.inputs[0].dtype, op.has_multiplier, op.attributes, enumerator(op.kind))
        for op in OPS.values()
    }


def test_the_glue_reads_operands_in_the_order_of_the_table() -> None:
    """The glue takes packed, then a multiplier where there is one, then scale, and no other operand."""
    for op in OPS.values():
        assert op.weight_names == ("packed", *(["multiplier"] if op.has_multiplier else []), "scale")
        assert {operand.name: operand.dtype for operand in op.inputs[1:]} == {
            "packed": "uint8",
            "scale": "float32",
            **({"multiplier": "uint8"} if op.has_multiplier else {}),
        }
        assert len(op.attributes) <= 1


def test_the_glue_registers_the_domain_of_the_table() -> None:
    assert re.findall(r'<kCreateCustomOpDomain>\(api, "([^"]+)"', GLUE.read_text()) == [DOMAIN]


@pytest.mark.parametrize(
    "source",
    [NATIVE / "c_api.cpp", ROOT / "bench" / "pi" / "counting" / "sources" / "one_product.cpp"],
    ids=lambda path: path.name,
)
def test_a_list_of_products_has_the_names_of_the_table_in_the_order_of_the_enumeration(source: Path) -> None:
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
