"""THE table of the `ai.microvlm` operators: operands, packing, widths and float order of each.

Exporter, torch operators, checkpoints, benchmarks and tests look everything up here, and a test compares the lists in
the C++ sources with it. A changed byte layout is a new operator name, never a new version. `docs/adding.md` says how to
add a packing.
"""

from __future__ import annotations

from dataclasses import replace

from microvlm.formats import packing
from microvlm.formats.op_spec import Operand, OpSpec, Pack, Unpack

DOMAIN = "ai.microvlm"
DOMAIN_VERSION = 1

OPS: dict[str, OpSpec] = {}
"""Operator name -> operator, in the order of the table."""
MATMUL_BY_KIND: dict[str, OpSpec] = {}
"""Storage kind -> its matrix product."""
LOOKUP_BY_KIND: dict[str, OpSpec] = {}
"""Storage kind -> its table lookup, where there is one."""
MATMUL_BY_PACKING: dict[str, OpSpec] = {}
"""Value of --packing -> its ternary matrix product."""


def add_row(op: OpSpec) -> OpSpec:
    """Add one operator to the table. Raises ValueError when its name, packing name, or its kind's role, is taken."""
    by_kind = LOOKUP_BY_KIND if op.is_lookup else MATMUL_BY_KIND
    if op.name in OPS or op.kind in by_kind or op.packing_name in MATMUL_BY_PACKING:
        raise ValueError(f"the table has {op.name}, or another operator of {op.kind}, already")
    OPS[op.name] = by_kind[op.kind] = op
    if op.packing_name is not None:
        MATMUL_BY_PACKING[op.packing_name] = op
    return op


_X = Operand("x", "float32", "[..., K]")
_Y = Operand("y", "float32", "[..., N]")
# These two strings are written into bundles.
_FLOAT_ORDER = "float(acc) * ((peak / 127) * scale)"
_LOOKUP_ORDER = "float(integer weight) * scale"


def ternary_row(
    name: str, *, kind: str, torch_op: str, packing_name: str, layout: str, rows_per_byte: int, pack: Pack,
    unpack: Unpack, trit_layout: packing.TernaryLayout | None = None,
) -> OpSpec:  # fmt: skip
    """A ternary product over uint8 [R, K], R = ceil(N / rows_per_byte)."""
    p = rows_per_byte
    return OpSpec(
        name=name,
        kind=kind,
        torch_op=torch_op,
        bits=1.58,
        inputs=(
            _X,
            Operand("packed", "uint8", f"[R = ceil(N / {p}), K]"),
            Operand("scale", "float32", "[S]"),
        ),
        output=_Y,
        attributes=("rows",),
        layout=layout,
        padding=f"N to a multiple of {p} with zero trits; attribute `rows` is N",
        scale_shape="[1] for one a tensor, [N] for one a row",
        float_order=_FLOAT_ORDER,
        weight_absmax=1,
        pack=pack,
        unpack=unpack,
        packing_name=packing_name,
        trit_layout=trit_layout,
        rows_per_byte=p,
    )


def plane_row(
    name: str, *, kind: str, torch_op: str, packing_name: str, trit_layout: packing.TernaryLayout
) -> OpSpec:
    """A ternary product whose bytes are digits in planes, as `packing.pack_trits` writes them."""
    base, p = trit_layout
    return ternary_row(
        name,
        kind=kind,
        torch_op=torch_op,
        packing_name=packing_name,
        layout=f"packed[r, k] = sum of (trit[p * R + r, k] + 1) * {base}^p, p < {p}",
        rows_per_byte=p,
        pack=lambda trits: (packing.pack_trits(trits, trit_layout),),
        unpack=lambda packed, *, rows, columns: packing.unpack_trits(packed, rows, trit_layout),
        trit_layout=trit_layout,
    )


TERNARY_2X4 = add_row(
    plane_row(
        "TernaryMatMul2x4",
        kind="ternary2x4",
        torch_op="ternary_matmul_2x4",
        packing_name="2bit",
        trit_layout=packing.LAYOUT_2X4,
    )
)
TERNARY_3X5 = add_row(
    plane_row(
        "TernaryMatMul3x5",
        kind="ternary3x5",
        torch_op="ternary_matmul_3x5",
        packing_name="base3",
        trit_layout=packing.LAYOUT_3X5,
    )
)
INT8_MATMUL = add_row(
    OpSpec(
        name="Int8MatMul",
        kind="int8",
        torch_op="int8_matmul",
        bits=8,
        inputs=(_X, Operand("packed", "uint8", "[N, K]"), Operand("scale", "float32", "[N]")),
        output=_Y,
        attributes=(),
        layout="packed[n, k] = q + 128, q in -127..127",
        padding="none",
        scale_shape="[N]",
        float_order=_FLOAT_ORDER,
        weight_absmax=127,
        pack=lambda q: (packing.pack_rows_int8(q),),
        unpack=lambda packed, *, rows, columns: packing.unpack_rows_int8(packed),
        quantize=packing.quantize_rows_int8,
    )
)
INT4_MATMUL = add_row(
    OpSpec(
        name="Int4MatMul",
        kind="int4",
        torch_op="int4_matmul",
        bits=4,
        inputs=(
            _X,
            Operand("packed", "uint8", "[N, Kp / 2]"),
            Operand("multiplier", "uint8", "[N, G = Kp / 32]"),
            Operand("scale", "float32", "[N]"),
        ),
        output=_Y,
        attributes=(),
        # This string is written into bundles.
        layout="packed[n, j] = (q[2j] + 8) | (q[2j + 1] + 8) << 4; weight = q * multiplier[n, k / 32]",
        padding="K to Kp, a multiple of 32, with q = 0; activations_q8 are padded with 0",
        scale_shape="[N]",
        float_order=_FLOAT_ORDER,
        weight_absmax=7 * 255,
        pack=packing.pack_groups_int4,
        unpack=lambda packed, multiplier, *, rows, columns: packing.unpack_groups_int4(
            packed, multiplier, columns
        ),
        quantize=packing.quantize_groups_int4,
        columns_per_byte=2,
        group=packing.GROUP,
        max_columns=packing.INT4_MAX_COLUMNS,
    )
)


def _lookup_row(
    product: OpSpec, name: str, torch_op: str, attributes: tuple[str, ...], padding: str
) -> OpSpec:
    """A lookup of rows of the table that `product` multiplies by."""
    letters = str.maketrans({"N": "V", "K": "H"})
    weights = tuple(
        replace(operand, shape=operand.shape.translate(letters)) for operand in product.inputs[1:]
    )
    return replace(
        product,
        name=name,
        torch_op=torch_op,
        inputs=(Operand("input_ids", "int64", "[...]"), *weights),
        output=Operand("y", "float32", "[..., H]"),
        attributes=attributes,
        padding=padding,
        scale_shape="[V]",
        float_order=_LOOKUP_ORDER,
    )


INT8_GATHER = add_row(_lookup_row(INT8_MATMUL, "Int8Gather", "int8_gather", (), "none"))
INT4_GATHER = add_row(
    _lookup_row(
        INT4_MATMUL,
        "Int4Gather",
        "int4_gather",
        ("columns",),
        "H to Hp, a multiple of 32; attribute `columns` is H",
    )
)
