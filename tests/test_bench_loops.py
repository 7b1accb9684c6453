"""Predicted inner loops: what the model of a Cortex-A53 says of loops whose cycles are known, and the report."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from microvlm.bench.bench_command import command
from microvlm.bench.kernels.cortex_a53 import missing
from microvlm.bench.loops import mca_core
from microvlm.bench.loops.in_order_core import cycles_of, cycles_once
from microvlm.bench.report import report_of_file
from microvlm.errors import UserError

FOUR = "smlal v0.8h, v8.8b, v9.8b\nsmlal v1.8h, v8.8b, v9.8b\nand v2.16b, v8.16b, v9.16b\nushr v3.16b, v8.16b, #4"


@pytest.mark.parametrize(
    ("body", "cycles"),
    [
        # Throughputs of the published table: four of a kind that do not depend on each other.
        (FOUR, 4),
        ("ldr q0, [x0]\nldr q1, [x0, #16]", 4),
        ("ldp q0, q1, [x0]", 4),
        ("ldr x0, [x4]\nldr x1, [x4, #8]", 2),
        ("ldp x0, x1, [x4]", 2),
        ("add x0, x5, #1\nadd x1, x5, #2\nadd x2, x5, #3\nadd x3, x5, #4", 2),
        ("sadalp v0.4s, v8.8h\nsadalp v1.4s, v8.8h", 4),
        ("tbl v0.16b, {v8.16b-v9.16b}, v10.16b", 2),
        # Latencies: a chain through one register.
        ("mul v0.8h, v0.8h, v0.8h", 4),
        ("add v0.4s, v0.4s, v0.4s", 2),
        ("and v0.16b, v0.16b, v1.16b", 1),
        ("ldr x0, [x0]", 3),
        # An accumulator is forwarded to the next multiply-add, and not to anything else.
        ("smlal v0.8h, v8.8b, v9.8b", 1),
        ("smlal v0.8h, v8.8b, v9.8b\nsshr v0.8h, v0.8h, #1", 6),
        # Which instructions issue together.
        ("smlal v0.8h, v8.8b, v9.8b\nldr x0, [x4]", 1),
        ("smlal v0.8h, v8.8b, v9.8b\nldr d1, [x4]", 2),
        ("smlal v0.8h, v8.8b, v9.8b\nldr q1, [x4]", 3),
        ("ldr d0, [x4]\nfmov d1, x5", 1),
        ("ldr d0, [x1]\nfmov d1, x2\nldr x2, [x1, #8]\nsmlal v16.8h, v4.8b, v5.8b", 3),
        ("ldr d0, [x1]\nins v1.d[1], x2\nldr d1, [x3]\nfmov d3, x2", 6),
        ("smlal v0.8h, v8.8b, v9.8b\nadd x0, x5, #1\nsmlal v1.8h, v8.8b, v9.8b\nadd x1, x5, #1", 2),
    ],
)  # fmt: skip
def test_a_loop_takes_what_was_measured_of_a_cortex_a53(body: str, cycles: int):
    assert cycles_of(body.splitlines()) == cycles


@pytest.mark.parametrize(
    ("code", "cycles"),
    [
        ("add x0, x5, #1\nadd x1, x5, #2\nadd x2, x5, #3", 2),
        ("ldr x0, [x4], #8\nadd x4, x4, #1\nadd x0, x0, #1", 4),
        ("fdiv s0, s1, s2\nfdiv s3, s4, s5\nfadd s6, s7, s8", 11),
        ("fadd s0, s1, s2\nfmul s3, s0, s4", 5),
        ("bsl v0.16b, v1.16b, v2.16b\nand v3.16b, v0.16b, v4.16b", 3),
        # A call comes back, or another function goes on, some cycles later.
        ("bl 0x40\nadd x0, x0, #1", 4),
    ],
)
def test_code_that_runs_once_starts_with_everything_ready(code: str, cycles: int):
    assert cycles_once(code.splitlines()) == cycles


@pytest.mark.skipif(mca_core.version() is None, reason="needs llvm-mca")
def test_llvm_mca_takes_many_sequences_at_once():
    chain = ["add x0, x0, #1"] * 5
    sequences = [chain, [*chain, *chain], ["cbnz\tx0, 0x40"], ["bl\t0x40"]]
    short, long, branch, call = mca_core.total_cycles(sequences)
    assert long - short == 5, "a chain of additions takes a cycle each"
    assert 0 < branch <= short
    assert 0 < call < 100, "what is called is not a part of the sequence"
    assert mca_core.total_cycles([["no such instruction"]]) is None


def test_an_instruction_without_timings_is_named():
    with pytest.raises(UserError, match=r"no timing of 'aese v0.16b, v1.16b' is known"):
        cycles_of(["aese v0.16b, v1.16b"])


def test_every_loop_of_the_kernels_is_predicted_by_both_models(tmp_path):
    reason = missing("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "llvm-mca")
    if reason:
        pytest.skip(reason)
    path = tmp_path / "loops.json"
    result = CliRunner().invoke(command, ["loops", "-o", str(path)])
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    loops = {(loop["op"], loop["packed_rows"], loop["tokens"]): loop for loop in document["loops"]}
    assert {op for op, _, _ in loops} == {"TernaryMatMul2x4", "TernaryMatMul3x5", "Int8MatMul", "Int4MatMul"}
    decode = loops["TernaryMatMul2x4", 2, 1]
    # 64 multiply-adds of eight products, 32 instructions that take codes apart, 12 loads of two cycles.
    assert decode["multiply_adds"] == 512
    assert 512 / decode["predicted_timings_macs_per_cycle"] >= 64 + 32 + 2 * 12
    assert decode["predicted_mca_macs_per_cycle"] <= decode["predicted_mca_bound_macs_per_cycle"]
    assert "TernaryMatMul2x4" in report_of_file(path).text()


def test_a_missing_compiler_is_one_sentence():
    result = CliRunner().invoke(command, ["loops", "--compiler", "no-such-compiler"])
    assert result.exit_code == 1
    assert isinstance(result.exception, UserError)
    assert shutil.which("no-such-compiler") is None
    assert "Not found: no-such-compiler" in str(result.exception)
