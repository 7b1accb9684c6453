"""Predicts how many cycles the native library takes on a Cortex-A53, from the code that it executed under emulation.

The counting plugin lists blocks of code and how often each came after which other one. A step costs what a block adds
behind the one before: a loop of one block what an iteration takes once it repeats itself, any other step the cycles of
both blocks less those of the first; after code outside of the library all registers are ready. Two models of the core
say how long code takes: published timings (`in_order_core`) and llvm-mca. One core; every load hits the first cache.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from microvlm.bench.kernels.cortex_a53 import CROSS, parse_disassembly
from microvlm.bench.loops import mca_core
from microvlm.bench.loops.in_order_core import cycles_of, cycles_once

LISTING = ("executed-block", "executed-step")
"""How the plugin's lines begin that are read here."""
DISASSEMBLER = f"{CROSS}objdump"
WORD = 4
"""Bytes of an instruction."""
ITERATIONS = (20, 120)
"""Of llvm-mca over a loop: the cycles of those in between are an iteration's."""


@dataclass(frozen=True)
class Block:
    """Code without a branch but at its end: its address and its bytes."""

    address: int
    code: bytes


@dataclass(frozen=True)
class Step:
    """How often `block` came after `before`; None: after code outside of the library."""

    before: Block | None
    block: Block
    times: int


@dataclass(frozen=True)
class Cycles:
    """Cycles of one core by published timings and by llvm-mca; None where llvm-mca is missing or refuses."""

    timings: float
    mca: float | None


def parse_steps(text: str) -> dict[int, tuple[Step, ...]]:
    """{region: steps} of the plugin's lines."""
    blocks = {
        int(number): Block(int(address), bytes.fromhex(code))
        for number, address, code in re.findall(
            r"^executed-block id=(\d+) address=(\d+) words=([0-9a-f]+)$", text, re.M
        )
    }
    steps: dict[int, list[Step]] = {}
    for line in re.findall(r"^executed-step region=(\d+) before=(\d+) block=(\d+) times=(\d+)$", text, re.M):
        region, before, block, times = map(int, line)
        steps.setdefault(region, []).append(Step(blocks.get(before), blocks[block], times))
    return {region: tuple(of_region) for region, of_region in steps.items()}


def join(steps: Sequence[Step]) -> list[Step]:
    """The same steps with blocks made one that always follow each other in memory and in time.

    The emulator also ends a block at the end of a page and after some hundred instructions, even within a loop.
    """
    counted: Counter[tuple[Block | None, Block]] = Counter()
    before: Counter[Block | None] = Counter()
    after: Counter[Block] = Counter()
    for step in steps:
        # Code that was translated twice is one block.
        counted[step.before, step.block] += step.times
        before[step.before] += step.times
        after[step.block] += step.times
    following = {
        first: second
        for (first, second), count in counted.items()
        if first is not None
        and first.address + len(first.code) == second.address
        and count == after[first] == before[first] == after[second]
    }
    joined: dict[Block, Block] = {}
    for first in set(after) - set(following.values()):
        chain = [first]
        while chain[-1] in following:
            chain.append(following[chain[-1]])
        whole = Block(first.address, b"".join(block.code for block in chain))
        joined |= dict.fromkeys(chain, whole)
    return [
        Step(None if first is None else joined[first], joined[second], count)
        for (first, second), count in counted.items()
        if first is None or following.get(first) != second
    ]


def predict_cycles(regions: Sequence[Sequence[Step]]) -> list[Cycles]:
    """Cycles of each region. Raises UserError for an instruction without timings."""
    joined = [join(steps) for steps in regions]
    pairs = list(dict.fromkeys((step.before, step.block) for steps in joined for step in steps))
    blocks = list(dict.fromkeys(block for pair in pairs for block in pair if block is not None))
    code = dict(zip(blocks, disassemble([block.code for block in blocks]), strict=True))
    loops = [block for before, block in pairs if before == block]
    steps = [(before, block) for before, block in pairs if before != block]
    timings: dict[tuple[Block | None, Block], float] = {
        (block, block): cycles_of(code[block]) for block in loops
    }
    alone = {block: cycles_once(code[block]) for block in blocks}
    for before, block in steps:
        both = alone[block] if before is None else cycles_once([*code[before], *code[block]]) - alone[before]
        timings[before, block] = both
    mca = _by_mca(loops, steps, code)
    return [
        Cycles(
            sum(step.times * timings[step.before, step.block] for step in of_region),
            None if mca is None else sum(step.times * mca[step.before, step.block] for step in of_region),
        )
        for of_region in joined
    ]


def _by_mca(
    loops: Sequence[Block], steps: Sequence[tuple[Block | None, Block]], code: dict[Block, list[str]]
) -> dict[tuple[Block | None, Block], float] | None:
    if mca_core.version() is None:
        return None
    few, many = (mca_core.total_cycles([code[block] for block in loops], times) for times in ITERATIONS)
    alone = mca_core.total_cycles(list(code.values()))
    behind = [(before, block) for before, block in steps if before is not None]
    both = mca_core.total_cycles([[*code[before], *code[block]] for before, block in behind])
    if few is None or many is None or alone is None or both is None:
        return None
    first, last = ITERATIONS
    cycles_alone = dict(zip(code, alone, strict=True))
    return {
        **{
            (block, block): (long - short) / (last - first)
            for block, short, long in zip(loops, few, many, strict=True)
        },
        **{(None, block): cycles_alone[block] for before, block in steps if before is None},
        **{pair: cycles - cycles_alone[pair[0]] for pair, cycles in zip(behind, both, strict=True)},
    }


def disassemble(pieces: Sequence[bytes]) -> list[list[str]]:
    """The instructions of each piece of code, as `objdump` writes them."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(b"".join(pieces))
        options = ("-D", "-z", "-b", "binary", "-m", "aarch64", "--no-show-raw-insn")
        text = subprocess.run(
            [DISASSEMBLER, *options, str(path)], check=True, capture_output=True, text=True
        ).stdout
    lines = [line for code in parse_disassembly(text).values() for _, line in code]
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece) // WORD)
    return [lines[begin:end] for begin, end in itertools.pairwise(ends)]
