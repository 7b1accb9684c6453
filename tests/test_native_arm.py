"""The ARM kernels under emulation equal the reference, use no instruction an A53 lacks, and stay below their counts.

Needs a cross-compiler and qemu-user; a skip names the missing one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from microvlm.bench.kernels import cortex_a53

# The sources of this checkout: an installed package has none.
ROOT = Path(__file__).resolve().parent.parent
cortex_a53.KERNELS = ROOT / "backends" / "native"

pytestmark = [pytest.mark.emulated, pytest.mark.native]
cortex_a53.PROGRAMS = ROOT / "bench" / "pi" / "counting" / "sources"

PROGRAM_SOURCE = Path(__file__).resolve().with_name("native_variants.cpp")
CROSS_TOOLS = (f"{cortex_a53.CROSS}g++", f"{cortex_a53.CROSS}objdump", "qemu-aarch64-static")
SHAPE = (896, 4864)
"""K and N of a Qwen2.5-0.5B gate; the bounds of the counts are for this shape."""

NEWER_THAN_ARMV8_0 = {
    "dot product or matrix product": r"([su]|us|su)dot|[su]mmla|usmmla|bf\w+",
    "large system extensions": r"(ld|st)(add|clr|eor|set|[su]max|[su]min)\w*|swp\w*|cas\w*",
    "cryptography": r"aes\w+|sha(1|256|512)\w+|pmull2?",
    "rounding multiply-accumulate": r"sqrdml[as]h",
}


def need(*tools: str) -> None:
    reason = cortex_a53.missing(*tools)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    need(*CROSS_TOOLS)
    return cortex_a53.build_objects(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def program(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cortex_a53.build_program(
        PROGRAM_SOURCE, objects, tmp_path_factory.mktemp("program") / "native_variants"
    )


@pytest.fixture(scope="module")
def count_instructions(
    objects: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., cortex_a53.Count]:
    need("qemu-aarch64", "cc")
    folder = tmp_path_factory.mktemp("counted")
    one_product = cortex_a53.build_program(
        cortex_a53.PROGRAMS / "one_product.cpp", objects, folder / "one_product"
    )
    plugin = cortex_a53.build_counter(folder)
    return lambda op, tokens=1: cortex_a53.count(plugin, one_product, op, *SHAPE, tokens)


@pytest.fixture(scope="module")
def estimates(objects: list[Path]) -> dict[tuple[str, int], float]:
    """{(op, tokens): simulated multiply-adds per cycle of the loop with the most rows}."""
    need("llvm-mca")
    loops = cortex_a53.find_loops(objects[0].with_name("kernels_neon.o"))
    most: dict[tuple[str, int], cortex_a53.Loop] = {}
    for loop in loops:
        if loop.rows >= most.get((loop.op, loop.tokens), loop).rows:
            most[loop.op, loop.tokens] = loop
    return {key: cortex_a53.simulate(loop).predicted_macs_per_cycle for key, loop in most.items()}


def run(program: Path, cpu: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["qemu-aarch64-static", "-cpu", cpu, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("cpu", "variant"), [("cortex-a53", "neon"), ("max", "neon-dot")])
def test_variant_equals_the_reference_bit_for_bit(program: Path, cpu: str, variant: str) -> None:
    result = run(program, cpu, variant)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(rf"{variant}: \d{{4,}} cases equal\n", result.stdout)


def test_processor_decides_the_variant(program: Path) -> None:
    assert run(program, "cortex-a53").stdout.split() == ["neon", "reference"]
    assert run(program, "cortex-a76").stdout.split() == ["neon-dot", "neon", "reference"]


def test_comparison_fails_for_sums_that_overflow(objects: list[Path], tmp_path: Path) -> None:
    """Sixteen bits hold 24 products of a value up to 10 with an activation; 32 of them are too many."""
    sources = tmp_path / "native"
    shutil.copytree(cortex_a53.KERNELS, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    header = sources / "neon" / "neon_ternary.h"
    text = header.read_text()
    assert text.count("kUnit = 192;") == 1
    header.write_text(text.replace("kUnit = 192;", "kUnit = 256;"))
    overflowing = cortex_a53.build_object(sources / f"{cortex_a53.NEON}.cpp", cortex_a53.ARMV8_0, tmp_path)
    other_objects = [file for file in objects if file.name != overflowing.name]
    broken_program = cortex_a53.build_program(
        PROGRAM_SOURCE, [*other_objects, overflowing], tmp_path / "broken"
    )
    result = run(broken_program, "cortex-a53", "neon")
    assert result.returncode == 1
    assert "differ: neon, 2x4" in result.stdout


def newer_instructions(file: Path) -> set[str]:
    """Kinds of instructions in an object file that ARMv8.0 lacks; half floats may only be converted."""
    kinds = set()
    for code in cortex_a53.disassemble(file).values():
        for _, instruction in code:
            name, _, operands = instruction.partition("\t")
            kinds |= {kind for kind, names in NEWER_THAN_ARMV8_0.items() if re.fullmatch(names, name.strip())}
            is_float = re.match(r"f(?!cvt(l|n|xn)?2?\b)|[su]cvtf", name.strip()) is not None
            if is_float and re.search(r"\bv\d+\.[48]h|\bh\d+\b", operands):
                kinds.add("half floats")
            if re.search(r"\b[zp]\d+\.[bhsd]\b", operands):
                kinds.add("scalable vectors")
    return kinds


def test_only_the_dot_variant_uses_newer_instructions(objects: list[Path]) -> None:
    kinds = {file.stem: newer_instructions(file) for file in objects}
    assert kinds.pop("kernels_neon_dot") == {"dot product or matrix product"}
    assert kinds == {
        Path(name).name: set() for name in cortex_a53.SOURCES if Path(name).name != "kernels_neon_dot"
    }


def test_flags_equal_those_of_the_cmake_build() -> None:
    need()
    cmake = (cortex_a53.KERNELS / "CMakeLists.txt").read_text()
    spelled_by_cmake = {"-std=c++17", "-fPIC"}
    assert [flag for flag in cortex_a53.FLAGS if flag not in cmake and flag not in spelled_by_cmake] == []
    assert f'kernels_neon.cpp PROPERTIES COMPILE_OPTIONS "{cortex_a53.ARMV8_0}"' in cmake
    assert f'kernels_neon_dot.cpp PROPERTIES COMPILE_OPTIONS "{cortex_a53.DOT_PRODUCT}"' in cmake


@pytest.mark.parametrize(("op", "least"), [("TernaryMatMul2x4", 3.5), ("TernaryMatMul3x5", 2.0)])
def test_simulated_a53_reaches_the_multiply_adds_per_cycle(
    estimates: dict[tuple[str, int], float], op: str, least: float
) -> None:
    assert estimates[op, 1] >= least


@pytest.mark.parametrize(("op", "most"), [("TernaryMatMul2x4", 0.32), ("TernaryMatMul3x5", 0.50)])
def test_executed_instructions_per_multiply_add_stay_below_the_bound(
    count_instructions: Callable[..., cortex_a53.Count], op: str, most: float
) -> None:
    result = count_instructions(op)
    assert result.crypto == 0
    assert result.total / (result.k * result.n * result.tokens) <= most


def test_counts_repeat_exactly(count_instructions: Callable[..., cortex_a53.Count]) -> None:
    assert count_instructions("Int8MatMul") == count_instructions("Int8MatMul")


def test_count_of_multiplications_equals_the_algorithms(
    count_instructions: Callable[..., cortex_a53.Count],
) -> None:
    """Eight multiply-adds an instruction, and K and N that leave nothing over."""
    k, n = SHAPE
    assert count_instructions("TernaryMatMul2x4").multiply == k * n / 8
    assert count_instructions("TernaryMatMul2x4", 4).multiply == 4 * k * n / 8


def test_innermost_loop_is_found_in_a_disassembly() -> None:
    text = """
0000000000000000 <void tile_sums<Mac, Base4, 2, 1>(long)>:
   0:\tmov\tx1, #0x0                   \t// #0
   4:\tldr\tq0, [x0, x1]
   8:\tsmlal\tv1.8h, v0.8b, v2.8b
   c:\tsmlal2\tv1.8h, v0.16b, v2.16b
  10:\tb.lt\t4 <void tile_sums<Mac, Base4, 2, 1>(long)+0x4>  // b.tstop
  14:\tsadalp\tv3.4s, v1.8h
  18:\tcbnz\tx2, 0 <void tile_sums<Mac, Base4, 2, 1>(long)>
  1c:\tret

0000000000000020 <other>:
  20:\tret
"""
    functions = cortex_a53.parse_disassembly(text)
    assert [len(code) for code in functions.values()] == [8, 1]
    (body,) = cortex_a53.innermost_loops(functions["void tile_sums<Mac, Base4, 2, 1>(long)"])
    assert body[0].startswith("ldr")
    assert body[-1].endswith("1b")
    assert cortex_a53.multiply_adds(body) == 16
