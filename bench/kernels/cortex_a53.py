"""Estimates the kernels' cost on a Cortex-A53: loops simulated by llvm-mca and instructions counted under QEMU.

Builds the C++ sources of a checkout with a cross-compiler. Times nothing: `predicted_` figures are a simulator's,
counts are exact. Where a tool is missing, functions return None and a sentence that says which one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from microvlm.formats.op_table import MATMUL_BY_KIND

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "backends" / "native"
PROGRAMS = REPOSITORY / "bench" / "pi" / "counting" / "sources"

CROSS = "aarch64-linux-gnu-"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-fno-rtti",
)
ARMV8_0 = "-march=armv8-a"
DOT_PRODUCT = "-march=armv8.2-a+dotprod"
NEON = "neon/kernels_neon"
SOURCES = {
    "reference/kernels_reference": ARMV8_0,
    NEON: ARMV8_0,
    "neon/kernels_neon_dot": DOT_PRODUCT,
    "variants": ARMV8_0,
    "operators": ARMV8_0,
}
"""Sources of the kernels on aarch64 and the instructions each may use."""

MCA_ITERATIONS = 300


@dataclass(frozen=True)
class Loop:
    """The innermost loop of one tile: `rows` packed rows times `tokens` tokens."""

    op: str
    rows: int
    tokens: int
    instructions: int
    multiply_adds: int
    body: tuple[str, ...]


@dataclass(frozen=True)
class LoopEstimate:
    """llvm-mca's answer for a loop: as simulated, and what the busiest unit alone would allow."""

    loop: Loop
    predicted_macs_per_cycle: float
    predicted_macs_per_cycle_bound: float


@dataclass(frozen=True)
class Count:
    """Instructions executed by one product on one thread, quantisation and scaling included."""

    op: str
    k: int
    n: int
    tokens: int
    total: int
    simd: int
    multiply: int
    crypto: int


def missing(*tools: str) -> str:
    """Empty, or a sentence that names what is not here."""
    # An installed package has the folder, with the library and not the sources.
    if not (KERNELS / f"{NEON}.cpp").is_file():
        return "The C++ sources are not installed with the package; run this from a checkout."
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return f"Not found: {', '.join(absent)}." if absent else ""


def build_object(source: Path, march: str, folder: Path, compiler: Sequence[str] = (f"{CROSS}g++",)) -> Path:
    """Cross-compile one source of the kernels."""
    target = folder / f"{source.stem}.o"
    subprocess.run(
        [*compiler, *FLAGS, f"-I{KERNELS}", march, "-c", str(source), "-o", str(target)], check=True
    )
    return target


def build_objects(folder: Path) -> list[Path]:
    """Cross-compile the kernels and what chooses among them."""
    return [build_object(KERNELS / f"{name}.cpp", march, folder) for name, march in SOURCES.items()]


def build_program(main: Path, objects: Sequence[Path], output: Path) -> Path:
    """A static aarch64 program of one source over the kernels."""
    command = [f"{CROSS}g++", *FLAGS, ARMV8_0, f"-I{KERNELS}", str(main), *map(str, objects), "-static"]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output


def build_counter(folder: Path) -> Path:
    """The QEMU plugin that counts instructions, for this machine."""
    return build_library(PROGRAMS / "instruction_count.c", folder)


def build_library(source: Path, folder: Path) -> Path:
    """A shared library of one C source, for this machine. Raises CalledProcessError."""
    library = folder / f"{source.stem}.so"
    command = ["cc", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def disassemble(file: Path) -> dict[str, list[tuple[int, str]]]:
    """{demangled function: [(address, instruction)]}."""
    command = [f"{CROSS}objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse_disassembly(text)


def parse_disassembly(text: str) -> dict[str, list[tuple[int, str]]]:
    functions: dict[str, list[tuple[int, str]]] = {}
    for match in re.finditer(r"^[0-9a-f]+ <(.*)>:\n((?:[ \t].+\n?)*)", text, re.MULTILINE):
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(.+?)\s*(?://.*)?$", match[2], re.MULTILINE)
        functions[match[1]] = [(int(address, 16), instruction) for address, instruction in lines]
    return functions


def innermost_loops(code: Sequence[tuple[int, str]]) -> Iterator[tuple[str, ...]]:
    """Bodies that end in a backward branch, hold no other loop, and neither call nor return."""
    index = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for i, (address, instruction) in enumerate(code):
        branch = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\s+(?:\S+,\s*)*([0-9a-f]+) <", instruction)
        if branch and int(branch[1], 16) <= address and int(branch[1], 16) in index:
            spans.append((index[int(branch[1], 16)], i))
    for first, last in spans:
        if any(other != (first, last) and first <= other[0] and other[1] <= last for other in spans):
            continue
        body = tuple(re.sub(r"[0-9a-f]+ <.*", "1b", instruction) for _, instruction in code[first : last + 1])
        if not any(instruction.split()[0] in ("bl", "blr", "ret") for instruction in body):
            yield body


def multiply_adds(body: Sequence[str]) -> int:
    """Products of a code with an activation: 8 for smull and smlal on bytes, 16 for sdot."""
    long = sum(bool(re.match(r"sml?u?l?l?a?l2?\s+v\d+\.8h", line)) for line in body)
    dot = sum(line.startswith("sdot") for line in body)
    return 8 * long + 16 * dot


_TILE = re.compile(r"(?P<product>Base[34]|Int[48]<).*::tile<(?P<rows>\d), (?P<tokens>\d)>")
# The C++ classes of tiles are named after the base of their trits, or after the kind of storage.
_OP_OF_TILE = {
    f"Base{op.trit_layout.base}" if op.trit_layout else op.kind.capitalize(): op.name
    for op in MATMUL_BY_KIND.values()
}


def find_loops(file: Path) -> list[Loop]:
    """The main loop of every tile in an object file of a NEON variant."""
    loops = []
    for name, code in disassemble(file).items():
        tile = _TILE.search(name)
        if tile is None:
            continue
        bodies = [body for body in innermost_loops(code) if multiply_adds(body) > 0]
        body = max(bodies, key=multiply_adds)
        op = _OP_OF_TILE[tile["product"].rstrip("<")]
        loops.append(Loop(op, int(tile["rows"]), int(tile["tokens"]), len(body), multiply_adds(body), body))
    return sorted(loops, key=lambda loop: (loop.op, loop.tokens, -loop.rows))


def simulate(loop: Loop, cpu: str = "cortex-a53") -> LoopEstimate:
    """Run llvm-mca over a loop."""
    source = "1:\n" + "\n".join(loop.body) + "\n"
    command = ["llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}", f"-iterations={MCA_ITERATIONS}"]
    text = subprocess.run(command, check=True, input=source, capture_output=True, text=True).stdout
    cycles, bound = re.search(r"Total Cycles:\s+(\d+)", text), re.search(r"Block RThroughput:\s+(\S+)", text)
    assert cycles is not None, text
    assert bound is not None, text
    simulated = loop.multiply_adds * MCA_ITERATIONS / int(cycles[1])
    return LoopEstimate(loop, simulated, loop.multiply_adds / float(bound[1]))


def predicted_loops(compiler: Sequence[str] = (f"{CROSS}g++",)) -> tuple[list[LoopEstimate] | None, str]:
    """Multiply-adds per cycle of every loop of the ARMv8.0 variant on a Cortex-A53, or None and why not."""
    reason = missing(compiler[0], f"{CROSS}objdump", "llvm-mca")
    if reason:
        return None, reason
    with TemporaryDirectory() as folder:
        variant = build_object(KERNELS / f"{NEON}.cpp", ARMV8_0, Path(folder), compiler)
        return [simulate(loop) for loop in find_loops(variant)], ""


def count(plugin: Path, program: Path, op: str, k: int, n: int, tokens: int, variant: str = "neon") -> Count:
    """Run one product under emulation and read the counts of its second run."""
    arguments = [variant, op, str(k), str(n), str(tokens)]
    command = ["qemu-aarch64", "-cpu", "cortex-a53", "-plugin", str(plugin), str(program), *arguments]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    line = re.search(r"region=1 total=(\d+) simd=(\d+) multiply=(\d+) crypto=(\d+)", text)
    assert line is not None, text
    total, simd, multiply, crypto = map(int, line.groups())
    return Count(op, k, n, tokens, total, simd, multiply, crypto)
