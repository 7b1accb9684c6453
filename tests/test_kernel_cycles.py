"""Cycles of executed code: the plugin's listing, blocks that are one, and what a step from block to block costs."""

from __future__ import annotations

import shutil
import struct

import pytest

from microvlm.bench.loops import mca_core
from microvlm.bench.loops.in_order_core import cycles_of
from microvlm.bench.pi.counting.kernel_cycles import (
    DISASSEMBLER,
    Block,
    Step,
    disassemble,
    join,
    parse_steps,
    predict_cycles,
)

needs_disassembler = pytest.mark.skipif(shutil.which(DISASSEMBLER) is None, reason=f"needs {DISASSEMBLER}")
MOV, SUBS, B_NE, RET = 0xD2800060, 0xF1000400, 0x54FFFFE1, 0xD65F03C0
"""mov x0, #3; then the loop: subs x0, x0, #1; b.ne; then ret."""


def block(address: int, *words: int) -> Block:
    return Block(address, struct.pack(f"<{len(words)}I", *words))


BEGIN, LOOP, END = block(0, MOV, SUBS, B_NE), block(4, SUBS, B_NE), block(12, RET)


def test_the_listing_is_read_by_region():
    text = f"""noise
executed-block id=2 address=4 words={LOOP.code.hex()}
executed-block id=1 address=0 words={BEGIN.code.hex()}
instruction-count region=7 total=9 simd=4 multiply=2 crypto=0 library=3
executed-step region=7 before=0 block=1 times=1
executed-step region=7 before=1 block=2 times=1
executed-step region=8 before=2 block=2 times=5
"""
    assert parse_steps(text) == {
        7: (Step(None, BEGIN, 1), Step(BEGIN, LOOP, 1)),
        8: (Step(LOOP, LOOP, 5),),
    }


def test_blocks_that_always_follow_each_other_are_one():
    first, second, third = block(0, MOV), block(4, SUBS), block(8, B_NE)
    # The loop is `second` and `third`: the emulator cut it in two, and `first` leads into it once.
    steps = [Step(None, first, 1), Step(first, second, 1), Step(second, third, 9), Step(third, second, 8)]
    whole = Block(second.address, second.code + third.code)
    assert set(join(steps)) == {Step(None, first, 1), Step(first, whole, 1), Step(whole, whole, 8)}


def test_a_block_that_is_left_in_two_ways_stays_by_itself():
    steps = [
        Step(None, BEGIN, 1),
        Step(BEGIN, END, 1),
        Step(LOOP, LOOP, 3),
        Step(LOOP, END, 1),
        Step(None, LOOP, 1),
    ]
    assert set(join(steps)) == set(steps)


def test_blocks_apart_in_memory_are_not_joined():
    far = block(400, RET)
    assert set(join([Step(None, BEGIN, 2), Step(BEGIN, far, 2)])) == {
        Step(None, BEGIN, 2),
        Step(BEGIN, far, 2),
    }


@needs_disassembler
def test_code_is_disassembled_piece_by_piece():
    begin, empty, end = disassemble([BEGIN.code, b"", END.code])
    assert [line.split()[0] for line in begin] == ["mov", "subs", "b.ne"]
    assert empty == []
    assert end == ["ret"]


@needs_disassembler
def test_a_loop_costs_what_an_iteration_takes_once_it_repeats_itself():
    (lines,) = disassemble([LOOP.code])
    once, hundred, nothing = predict_cycles([[Step(LOOP, LOOP, 1)], [Step(LOOP, LOOP, 100)], []])
    assert once.timings == cycles_of(lines) > 0
    assert hundred.timings == 100 * once.timings
    assert nothing.timings == 0
    if mca_core.version() is not None:
        assert hundred.mca == pytest.approx(100 * once.mca)
        assert once.mca > 0


@needs_disassembler
def test_a_step_costs_what_the_block_adds_behind_the_other():
    whole = Block(BEGIN.address, BEGIN.code + END.code)
    apart = predict_cycles([[Step(None, BEGIN, 1), Step(BEGIN, END, 1), Step(None, END, 1)]])[0]
    together, alone = predict_cycles([[Step(None, whole, 1)], [Step(None, END, 1)]])
    assert apart.timings == together.timings + alone.timings
