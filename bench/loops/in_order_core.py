"""Predicts how long a loop takes on a Cortex-A53 from timings that others measured on one. Measures nothing.

Latencies and throughputs are those of a Raspberry Pi 3 (ocxtal/insn_bench_aarch64, results of a Cortex-A53). Which
instructions issue together is what ncnn's authors measured (Tencent/ncnn, arm-a53-a55-dual-issue.md):

- at most two instructions a cycle, in the order of the program;
- a 128-bit vector load takes two cycles in which no vector instruction issues, a 64-bit one takes one;
- an insert of 64 bits into a vector issues beside a 64-bit vector load;
- integer loads and integer arithmetic issue beside vector arithmetic.

llvm-mca's model of the same core lets a vector load issue beside vector arithmetic, and gives a multiply-add six
cycles. Not modelled: caches, stores behind loads, branches that were predicted wrongly, how many cycles the target of a
branch takes to be fetched, and that no load may issue in the fourth cycle of a multiply-add.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from microvlm.errors import UserError

WARM_UP, MEASURED = 8, 64
"""Iterations before the loop repeats itself, and those that are counted."""


@dataclass(frozen=True)
class Timing:
    """Cycles of one kind of instruction.

    latency : until a result can be read. vector, load, integer, divider : cycles for which the unit is taken.
    forwarded : the latency into the accumulator of the next instruction of the same kind, where that is shorter.
    half : a vector instruction on 64 bits, of which two issue in a cycle. behind : cycles until the next one issues.
    """

    latency: int
    vector: int = 0
    load: int = 0
    integer: int = 0
    divider: int = 0
    forwarded: int | None = None
    half: bool = False
    behind: int = 0


# Insert: 5.02 cycles to a vector register and back, of which the way back is 2 to 3.
INSERT = Timing(3, vector=1, half=True)
TIMINGS: tuple[tuple[str, Timing], ...] = (
    (r"(ldr|ldur) q", Timing(7, vector=2, load=2)),
    (r"ldp q", Timing(9, vector=4, load=4)),
    (r"(ldr|ldur) [dsbh]\d", Timing(6, vector=1, load=1, half=True)),
    (r"ldp [ds]", Timing(7, vector=2, load=2)),
    (r"ld1r? \{v\d+\.\w+\}(\[\d+\])", Timing(6, vector=1, load=1, half=True)),
    (r"ld1r \{v", Timing(6, vector=1, load=1, half=True)),
    (r"ld1 \{v\d+\.\w+\}, ", Timing(7, vector=2, load=2)),
    (r"ld1 \{v\d+\.\w+(-v|, v)\d+\.\w+\}, ", Timing(9, vector=4, load=4)),
    (r"(ldr|ldur) [xw]", Timing(3, load=1)),
    (r"ldp x", Timing(4, load=2)),
    (r"ldrs?[bhw] |ldurs?[bhw] |ldp w|ldpsw", Timing(4, load=2)),
    (r"ld[ax]\w* [xw]", Timing(4, load=2)),
    (r"stp q|st2", Timing(1, load=2)),
    (r"st[rplx]|stur|st1", Timing(1, load=1)),
    (r"prfm", Timing(1, load=1)),
    (r"(ins|mov) v\d+\.[dshb]\[\d\], [xw]|fmov [ds]\d+, [xw]", INSERT),
    (r"(ins|mov) v\d+\.[dshb]\[\d\], v", Timing(2, vector=1)),
    (r"([su]?mov|fmov) [xw]\d+, [vsd]", Timing(2, vector=1, half=True)),
    (r"(mov|dup) [sdhb]\d+, v|fmov [sd]\d+, (s|d|#)", Timing(2, vector=1, half=True)),
    (r"fmov v\d+\.\w+, #", Timing(1, vector=1)),
    (r"dup v\d+\.\w+, [xw]", Timing(3, vector=1)),
    (r"[su]m(la|ls)l2? v|ml[as] v", Timing(4, vector=1, forwarded=1)),
    (r"[su]mull2? v|mul v", Timing(4, vector=1)),
    (r"[su]adalp", Timing(4, vector=2)),
    (r"tbl v\d+\.16b, \{v\d+\.16b\}", Timing(2, vector=1)),
    (r"tbl v\d+\.16b, \{v\d+\.16b(-| ?, ?)v\d+\.16b\}", Timing(3, vector=2)),
    (r"(and|orr|eor|bic|mov|movi|mvn|not) v", Timing(1, vector=1)),
    (r"(add|sub|neg|shl|[su]shr|[su]sra|[su]xtl2?|[su]shll2?|[su]max|[su]min|bsl) v", Timing(2, vector=1)),
    (r"(ext|trn[12]|zip[12]|uzp[12]|dup|rev\d+|xtn2?) v", Timing(2, vector=1)),
    (r"(addp|addv|[su]addlp?2?|[su]addw2?|addhn2?|[su]qxtn2?|[su]addlv) ", Timing(4, vector=1)),
    (r"f(mla|mls) v", Timing(8, vector=1, forwarded=4)),
    (r"fn?m(add|sub) [sd]", Timing(8, vector=1, half=True)),
    (r"(fdiv|fsqrt) (s|v\d+\.[24]s)", Timing(12, vector=1, divider=9)),
    (r"(fdiv|fsqrt) ", Timing(22, vector=1, divider=19)),
    (r"fcmpe? ", Timing(1, vector=1)),
    (r"(fcsel|fcm\w+|fac\w+|cm\w+) [vsd]", Timing(2, vector=1)),
    (r"[su]cvtf [sd]\d+, [xw]", Timing(6, vector=1, half=True)),
    (r"fcvt\w* [xw]", Timing(4, vector=1, half=True)),
    (r"(f\w+|[su]cvtf) [sd]\d", Timing(4, vector=1, half=True)),
    (r"f\w+ v|scvtf v|ucvtf v", Timing(4, vector=1)),
    (r"madd|mul [xw]|[su]maddl|[su]mull x", Timing(3, integer=1)),
    # Call and return together: 6.05 cycles, 8.04 by a register.
    (r"bl |ret", Timing(1, integer=1, behind=3)),
    (r"blr? |br ", Timing(1, integer=1, behind=4)),
    (r"(b|b\.\w+|cbn?z|tbn?z) ", Timing(1, integer=1)),
    (r"[su]div [xw]", Timing(3, integer=1)),
    # What is left of vectors takes as long as most of it.
    (r"(?!aes|sha|sm[34]|pmull)\w+ [vsdhb]\d", Timing(4, vector=1)),
    (r"(add|sub|and|orr|eor|bic)s? [xw]\d+, [xw]\d+, [xw]\w+, (lsl|lsr|asr)", Timing(2, integer=1)),
    (r"\w+ ([xw]\d|sp|wzr|xzr)|cmp|cmn|tst|nop|ccm|hint|bti|pac|aut|prf|dmb|isb", Timing(1, integer=1)),
)  # fmt: skip
"""Instructions by pattern, as `objdump` writes them with one space; the first that matches counts."""

_REGISTER = re.compile(r"\b([vqdsbhxw])(\d+)\b|\b(sp)\b")
_BASE = re.compile(r"\[(?:x(\d+)|sp).*(?:\], (?:#|x)|\]!)")
"""The register that an access moves on."""
_WRITES_NOTHING = re.compile(
    r"(st\w*|cm[pn]|tst|b|b\.\w+|bl|blr|br|ret|cbn?z|tbn?z|nop|prfm|ccm[pn]|fcmpe?) "
)
_SETS_FLAGS = re.compile(r"(cm[pn]|tst|ccm[pn]|fcmpe?|adds|subs|ands|bics|negs|adcs|sbcs) ")
_READS_FLAGS = re.compile(r"(b\.|f?cs|cc|cin|cneg|adc|sbc|ngc)")
_ACCUMULATES = re.compile(
    r"([su]ml[as]l2?|ml[as]|[su]adalp|f?ml[as]|[su]sra|bsl|bi[tf]|bfi|bfxil|ins|ld1 .*\]|movk)\b|mov v\d+\.\w\["
)


@dataclass(frozen=True)
class Instruction:
    """One instruction: its timing, what it reads, what it writes, and the accumulator that it adds to."""

    text: str
    timing: Timing
    reads: frozenset[str]
    writes: frozenset[str]
    accumulator: str | None
    base: str | None
    """The register that an access moves on, by integer arithmetic."""
    is_branch: bool


@functools.cache
def parse(line: str) -> Instruction:
    """An instruction as `objdump` writes it. Raises UserError for one that the table does not hold."""
    text = re.sub(r"\s+", " ", line.strip())
    timing = next((timing for pattern, timing in TIMINGS if re.match(pattern, text)), None)
    if timing is None:
        raise UserError(f"no timing of '{text}' is known: add it to bench/loops/in_order_core.py.")
    name, _, rest = text.partition(" ")
    operands = [
        ("v" if kind in "vqdsbh" and kind else "x") + number if not stack else "sp"
        for kind, number, stack in _REGISTER.findall(rest)
    ]
    writes: set[str] = set()
    reads = set(operands)
    if operands and not _WRITES_NOTHING.match(text):
        count = (
            2
            if name.startswith("ldp")
            else len(re.findall(r"v\d+", text.split("}")[0]))
            if name == "ld1"
            else 1
        )
        writes |= set(operands[:count])
        if not _ACCUMULATES.match(text):
            reads = set(operands[count:])
    if _SETS_FLAGS.match(text):
        writes.add("flags")
    if _READS_FLAGS.match(text):
        reads.add("flags")
    moved = _BASE.search(text)
    base = None if moved is None else f"x{moved[1]}" if moved[1] else "sp"
    if base is not None:
        writes.add(base)
        reads.add(base)
    is_branch = bool(re.match(r"(b|b\.\w+|bl|blr|br|ret|cbn?z|tbn?z)( |$)", text))
    accumulator = operands[0] if timing.forwarded is not None and operands else None
    return Instruction(text, timing, frozenset(reads), frozenset(writes), accumulator, base, is_branch)


def cycles_of(body: Sequence[str]) -> float:
    """Cycles of one iteration of a loop's body, once it repeats itself. Raises UserError."""
    instructions = [parse(line) for line in body]
    core = _Core()
    for _ in range(WARM_UP):
        core.run(instructions)
    begin = core.cycle
    for _ in range(MEASURED):
        core.run(instructions)
    return (core.cycle - begin) / MEASURED


def cycles_once(body: Sequence[str]) -> int:
    """Cycles until the last instruction of a sequence has issued, all registers ready before. Raises UserError."""
    core = _Core()
    core.run([parse(line) for line in body])
    return core.cycle + 1


class _Core:
    """The state of the core: when registers can be read and units are free."""

    def __init__(self) -> None:
        self.cycle = 0
        self.issued: list[Instruction] = []
        self.ready: dict[str, int] = {}
        self.forwarded: dict[str, int] = {}
        self.free = {"vector": 0, "load": 0, "divider": 0}

    def run(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            self._issue(instruction)

    def _issue(self, instruction: Instruction) -> None:
        earliest = max([self.cycle, *(self._readable(name, instruction) for name in instruction.reads)])
        while True:
            if earliest > self.cycle:
                self.cycle, self.issued = earliest, []
            if self._fits(instruction):
                break
            earliest = self.cycle + 1
        timing = instruction.timing
        self.issued.append(instruction)
        if timing.vector:
            self.free["vector"] = max(self.free["vector"], self.cycle + timing.vector)
        if timing.load:
            self.free["load"] = self.cycle + timing.load
        if timing.divider:
            self.free["divider"] = self.cycle + timing.divider
        for name in instruction.writes:
            self.ready[name] = self.cycle + (1 if name == instruction.base else timing.latency)
            self.forwarded.pop(name, None)
        if instruction.accumulator is not None:
            self.forwarded[instruction.accumulator] = self.cycle + (timing.forwarded or timing.latency)
        if timing.behind:
            self.cycle, self.issued = self.cycle + timing.behind, []

    def _readable(self, name: str, instruction: Instruction) -> int:
        if name == instruction.accumulator and name in self.forwarded:
            return self.forwarded[name]
        return self.ready.get(name, 0)

    def _fits(self, instruction: Instruction) -> bool:
        """Whether an instruction issues in this cycle, beside what has been issued in it."""
        if len(self.issued) == 2 or any(other.is_branch for other in self.issued):
            return False
        timing = instruction.timing
        if timing.load and self.free["load"] > self.cycle:
            return False
        if timing.divider and self.free["divider"] > self.cycle:
            return False
        if timing.vector and self.free["vector"] > self.cycle:
            # Units that an earlier cycle took, or one of this cycle: then two halves go together.
            taken = [other for other in self.issued if other.timing.vector]
            pair = [*taken, instruction]
            busy_before = not taken
            return not busy_before and len(taken) == 1 and all(o.timing.half for o in pair)
        return True
