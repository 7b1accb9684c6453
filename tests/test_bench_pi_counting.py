"""Instructions really counted on an emulated Cortex-A53, and the gate that stands on them.

Needs qemu-user and a C compiler; skips, saying so, without them. Builds the emulated machine on first use.
"""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from microvlm.backends import native
from microvlm.backends.arm64.transports import device_package
from microvlm.backends.arm64.transports.device_package import package_for
from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.pi.count_baseline import NOISE, path_of
from microvlm.bench.pi.counting import counting_emulator
from microvlm.bench.pi.counting.counting_emulator import (
    IllegalInstruction,
    count,
    fixed_addresses,
    open_board,
)
from microvlm.bench.pi.counting.emulated_package import package_of_board
from microvlm.bench.pi.counting.kernel_cycles import DISASSEMBLER, predict_cycles
from microvlm.bench.pi.workload_phases import PHASES

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(
        not all(map(shutil.which, ("qemu-aarch64", "cc", DISASSEMBLER))),
        reason=f"needs qemu-user, a C compiler and {DISASSEMBLER}",
    ),
]

ROOT = Path(__file__).parent.parent

# mov x0, #N; then the loop: subs x0, x0, #1; b.ne; then ret: 2 N + 2 instructions, and what calls it.
LOOP = """
import ctypes, mmap, struct, json, sys
from microvlm.bench.pi.counting.count_marks import mark
code = struct.pack("<4I", 0xD2800000 | int(sys.argv[1]) << 5, 0xF1000400, 0x54FFFFE1, 0xD65F03C0)
memory = mmap.mmap(-1, 4096, prot=7)
memory.write(code)
call = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
call()
mark(3); call(); mark(0)
print(json.dumps("done"))
"""
# What ONNX Runtime does in every run: it asks for the time, and may do something else when some has passed.
CLOCK = """
import json, os, time
from microvlm.bench.pi.counting.count_marks import mark
start = time.time_ns()
words = {}
mark(3)
for number in range(2000):
    if number % 7 == time.time_ns() // 1000 % 7:
        words[number] = bytes(number % 3000)
mark(0)
print(json.dumps([start, time.time_ns(), time.monotonic(), os.environ.get("LD_PRELOAD")]))
"""
# What the safetensors library does at its first use: a hash table with a random key frees its entries in another order.
RANDOM = """
import json, os, random, time  # clock 5: Linux's CLOCK_REALTIME_COARSE
from microvlm.bench.pi.counting.count_marks import mark
mark(3)
kept = [bytes(random.randrange(3000)) for _ in range(200)]
mark(0)
print(json.dumps([os.urandom(16).hex(), time.clock_gettime(5)]))
"""
IMPORT = """
import json
from microvlm.bench.pi.counting.count_marks import mark
mark(3)
import numpy
mark(0)
print(json.dumps("done"))
"""
# udot v0.4s, v1.16b, v2.16b; ret
DOT_PRODUCT = """
import ctypes, mmap, struct
memory = mmap.mmap(-1, 4096, prot=7)
memory.write(struct.pack("<2I", 0x6E829420, 0xD65F03C0))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
"""


@pytest.fixture(scope="module")
def machine():
    return open_board(package_of_board())


def test_a_loop_of_known_length_is_counted(machine):
    totals = []
    for turns in (1000, 5000):
        output, regions = count(machine, ["-c", LOOP, str(turns)], Any)
        assert output == "done"
        totals.append(regions[3].total)
    assert totals[1] - totals[0] == 2 * 4000


def test_code_of_the_library_is_listed_with_what_came_before_it(machine):
    # The memory with the loop is marked as the library.
    mark = (
        "libc = ctypes.CDLL(None); libc.syscall(*map(ctypes.c_long, (125, 0x7E580000, start, start + 4096)))"
    )
    program = LOOP.replace(
        "call()\nmark(3); call(); mark(0)", f"{mark}\nmark(3, True); call(); mark(0); call()"
    )
    program = program.replace(
        "call = ", "start = ctypes.addressof(ctypes.c_char.from_buffer(memory))\ncall = "
    )
    output, regions = count(machine, ["-c", program, "100"], Any)
    assert output == "done"
    region = regions[3]
    assert region.library == 2 * 100 + 2
    instructions = [step.times * len(step.block.code) // 4 for step in region.steps]
    assert sum(instructions) == region.library
    # mov, subs and b.ne; 98 times subs and b.ne after themselves; ret.
    loops = [step for step in region.steps if step.before == step.block]
    assert [step.times for step in loops] == [98]
    (cycles,) = predict_cycles([region.steps])
    assert 100 <= cycles.timings <= 3 * 100


def test_a_program_that_asks_for_the_time_is_the_same_program_every_time(machine):
    (start, end, clock, preloaded), regions = count(machine, ["-c", CLOCK], list[Any])
    (start_again, end_again, clock_again, _), again = count(machine, ["-c", CLOCK], list[Any])
    assert (start, end) == (start_again, end_again)
    assert end - start == 2001 * 1000, "a microsecond a question"
    assert clock_again > clock, "the clock of timeouts goes on"
    assert preloaded is None, "the clock is QEMU's, not the program's"
    assert again[3] == regions[3]


def test_a_program_that_asks_for_random_bytes_is_the_same_program_every_time(machine):
    (bytes_, coarse), regions = count(machine, ["-c", RANDOM], list[Any])
    (bytes_again, coarse_again), again = count(machine, ["-c", RANDOM], list[Any])
    assert bytes_ == bytes_again
    assert len(set(bytes.fromhex(bytes_))) > 8
    assert coarse == coarse_again
    assert again[3] == regions[3]


def test_a_count_is_the_same_while_others_open_the_machine(machine):
    _, undisturbed = count(machine, ["-c", IMPORT], Any)
    is_counted = threading.Event()

    def open_again_and_again():
        while not is_counted.wait(0.05):
            open_board(package_of_board())

    thread = threading.Thread(target=open_again_and_again)
    thread.start()
    try:
        _, among_others = count(machine, ["-c", IMPORT], Any)
    finally:
        is_counted.set()
        thread.join()
    assert among_others[3] == undisturbed[3]


def test_an_instruction_that_a_cortex_a53_lacks_is_told(machine):
    with pytest.raises(IllegalInstruction, match="cortex-a53 lacks"):
        count(machine, ["-c", DOT_PRODUCT], Any)


def test_a_system_that_refuses_fixed_addresses_counts_without_them(monkeypatch, tmp_path):
    refusing = tmp_path / "setarch"
    refusing.write_text("#!/bin/sh\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fixed_addresses.__wrapped__() == []
    refusing.unlink()
    assert fixed_addresses.__wrapped__() == []
    refusing.write_text("#!/bin/sh\nexit 0\n")
    refusing.chmod(0o755)
    assert fixed_addresses.__wrapped__() == ["setarch", "-R"]


def test_two_counts_agree_where_addresses_are_random(machine, monkeypatch):
    monkeypatch.setattr(counting_emulator, "fixed_addresses", list)
    _, first = count(machine, ["-c", CLOCK], list[Any])
    _, again = count(machine, ["-c", CLOCK], list[Any])
    assert again[3] == first[3]


@pytest.fixture
def wheel_with_library(tmp_path_factory, monkeypatch):
    """An installed package may have the library for this machine alone: then one compiled from the sources here."""
    package = package_for("aarch64")
    if not package.no_library_reason:
        return
    folder = tmp_path_factory.mktemp("wheel")
    device_package.compile_library(ROOT / "backends" / "native", folder, "aarch64", "aarch64-linux-gnu-g++")
    wheel = folder / "microvlm-0.1.0-py3-none-manylinux_2_17_aarch64.whl"
    wheel.write_bytes(package.content)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(folder / native.LIBRARY, f"{device_package.NATIVE}/{native.LIBRARY}")
    monkeypatch.setenv(device_package.SWITCH, str(wheel))


def invoke(*arguments):
    result = CliRunner().invoke(command, ["pi", *arguments, "--target", "emulated", "--part", "cost"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.usefixtures("wheel_with_library")
def test_phases_are_counted_and_gated(tiny_bundle, tmp_path):
    folder, report_file = tmp_path / "baselines", tmp_path / "first.json"
    arguments = (str(tiny_bundle), "--baselines", str(folder))
    first = invoke(*arguments, "--update-baseline", "-o", str(report_file))
    assert first.exit_code == 0, first.output
    document = json.loads(report_file.read_text())
    cost = {row["phase"]: row for row in document["cost"]}
    assert list(cost) == ["load", *PHASES]
    assert document["counted_on"]["kernels"].startswith("native neon")
    for phase in ("vision", "prefill", "decode"):
        assert cost[phase]["instructions"] > cost[phase]["kernel_instructions"]
        assert cost[phase]["kernel_instructions"] > 0
        assert cost[phase]["simd"] > 0
        assert cost[phase]["crypto"] == 0, "a Raspberry Pi has no such instructions"
    assert {row["phase"] for row in document["predicted_ms"]} > set(PHASES)
    assert all(row["low"] <= row["high"] for row in document["predicted_ms"])
    assert "predicted, ms" in report.text(document)
    for phase, row in cost.items():
        cycles, instructions = row["predicted_timings_kernel_cycles"], row["kernel_instructions"]
        assert instructions / 2 <= cycles <= 10 * instructions, phase
    assert [row["phase"] for row in document["predicted_timings_ms"]] == [
        row["phase"] for row in document["predicted_ms"]
    ]
    assert "predicted from cycles, ms" in report.text(document)

    path = next(folder.iterdir())
    assert path == path_of(tiny_bundle.name.split("-")[0], "cortex-a53", folder)
    baseline = json.loads(path.read_text())
    # A token of the tiny model is so little that a fiftieth of it is noise.
    more = baseline["phases"]["decode"]["instructions"] * 1.02 + NOISE
    baseline["phases"]["decode"]["instructions"] = round(more)
    path.write_text(json.dumps(baseline))
    second = invoke(*arguments, "--gate", "--json")
    assert second.exit_code != 0 or "FAIL" in second.output
    failures = [line for line in second.stderr.splitlines() if line.startswith("FAIL: ")]
    assert len(failures) == 1
    assert failures[0].startswith("FAIL: cost: decode: ")
    again = {row["phase"]: row for row in json.loads(second.stdout)["cost"]}
    # Whole processes, from the same folders: equal as a rule. Should the C library's heap come to lie differently, a
    # phase costs a few thousand instructions more or less whatever its size: 2,415 were the most that was seen.
    for phase in PHASES:
        for figure in ("simd", "instructions"):
            counted, expected = again[phase][figure], cost[phase][figure]
            assert counted == pytest.approx(expected, rel=1e-3, abs=4_000), (phase, figure)
