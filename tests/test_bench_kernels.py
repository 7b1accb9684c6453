"""`microvlm-bench kernels`: the packed layouts of the contenders, the regimes, and the document of a real small run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from microvlm.backends import native
from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.kernels import contenders, kernel_graphs, workload
from microvlm.bench.kernels.contender_formats import NBits, pack_blocks, unpack_blocks
from microvlm.bench.kernels.contenders import FUNCTION, OURS, PEERS, Contender
from microvlm.bench.kernels.kernel_document import bar_for, compare, rows
from microvlm.bench.kernels.measure import Measurement
from microvlm.bench.kernels.product_check import expected, relative_error
from microvlm.bench.kernels.sessions import Libraries, Runner, Setting, settings_for
from microvlm.bench.kernels.timing import Cell, Timing
from microvlm.bench.kernels.workload import Plan, parse_shape
from microvlm.bench.roofline import StreamingRoofline, share
from microvlm.errors import UserError

EVERY = [*OURS, FUNCTION, *PEERS]
FACTS = {
    "cpu": "c",
    "date_utc": "d",
    "versions": {},
    "threads": [1, 2],
    "kernels": "avx2",
    "stream_gb_per_s": {"1": 12.0},
    "mapped_stream_gb_per_s": {"1": 12.0},
}
SMALL = ["--shape", "128x96", "--batch", "1,3", "--threads", "1", "--quick", "--regime", "hot"]


def _runner(contender: Contender, shape: str, copies: int, folder: Path, threads: int = 1) -> Runner:
    parsed = parse_shape(shape)
    operands = kernel_graphs.random_operands(contender.format, parsed)
    graph = kernel_graphs.write_graph(folder / "a.onnx", contender.format, parsed, operands, copies)
    return Runner(contender, Setting(), threads, [graph], Libraries(native.library_path(), folder))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_unpack_to_the_values_that_were_packed(bits):
    values = np.random.default_rng(0).integers(0, 1 << bits, (5, 256), dtype=np.uint8)
    packed = pack_blocks(values, bits, 128)
    assert packed.shape == (5, 2, 128 * bits // 8)
    assert np.array_equal(unpack_blocks(packed, bits), values)


def test_the_first_value_of_a_block_is_in_the_lowest_bits():
    values = np.zeros((1, 32), np.uint8)
    values[0, :4] = (3, 0, 2, 1)
    assert pack_blocks(values, 2, 32)[0, 0, 0] == 3 | 2 << 4 | 1 << 6
    assert pack_blocks(values, 4, 32)[0, 0].tolist()[:2] == [3, 2 | 1 << 4]


# 200 is not a multiple of a block: its padding must count as zero.
@pytest.mark.parametrize("shape", ["256x128", "200x48"])
@pytest.mark.parametrize("contender", EVERY, ids=lambda contender: contender.name)
def test_every_contender_multiplies_as_numpy_does(contender, shape, tmp_path):
    if contender.native and native.library_path() is None:
        pytest.skip("this package was installed without the native library")
    parsed = parse_shape(shape)
    operands = kernel_graphs.random_operands(contender.format, parsed)
    x = np.random.default_rng(3).standard_normal((5, parsed.inputs), np.float32)
    runner = _runner(contender, shape, 3, tmp_path)
    runner.bind(x)
    runner.run()
    expected_product = expected(contender.format, parsed, kernel_graphs.copy_of(operands, 2), x)
    assert relative_error(runner.result(), expected_product) <= contender.format.tolerance


def test_a_wrong_weight_is_outside_of_every_tolerance():
    parsed = parse_shape("256x128")
    x = np.random.default_rng(3).standard_normal((2, 256), np.float32)
    for contender in EVERY:
        operands = kernel_graphs.random_operands(contender.format, parsed)
        expected_product = expected(contender.format, parsed, operands, x)
        product = expected(contender.format, parsed, kernel_graphs.copy_of(operands, 1), x)
        assert relative_error(product, expected_product) > max(contender.format.tolerance, 0.1)
    assert not relative_error(np.full(3, np.nan), np.ones(3)) <= 1


def test_a_layer_is_its_seven_linears_in_order(tmp_path):
    layer = parse_shape("layer")
    assert (layer.k, layer.n, len(layer.linears)) == (0, 0, 7)
    assert layer.weights == 896 * (896 + 2 * 128 + 896 + 2 * 4864) + 4864 * 896
    assert [linear.name for linear in layer.results] == ["k", "v", "up", "down"]


def test_copies_of_a_matrix_are_memory_of_their_own(tmp_path):
    """Equal initializers would be kept once, and their bandwidth would be a cache's."""
    for contender in (FUNCTION, *PEERS):
        operands = kernel_graphs.random_operands(contender.format, parse_shape("128x96"))
        every = [kernel_graphs.copy_of(operands, copy)[0] for copy in range(40)]
        for array in range(len(operands[0])):
            contents = {copy[array].tobytes() for copy in every}
            assert len(contents) == (1 if operands[0][array].size == 1 else 40), contender.name


@pytest.mark.parametrize("megabytes", [0.004, 0.1, 0.2, 1.1, 4, 15, 60])
def test_regimes_hold_what_they_promise(megabytes):
    size = int(megabytes * 1e6)
    copies, count = workload.copies_and_graphs(size, "hot", largest_batch=64)
    assert count == 1
    assert copies * size <= workload.HOT_BYTES or copies == 1
    for largest_batch in (8, 9):
        copies, count = workload.copies_and_graphs(size, "dram", largest_batch)
        assert copies * count * size > 160e6
        assert copies <= workload.MOST_COPIES
        is_single_copy = largest_batch == 8 and size * workload.MOST_COPIES >= workload.DRAM_BYTES
        assert count == 1 if is_single_copy else (count - 1) * copies * size > 100e6


def test_many_tokens_have_shorter_graphs_in_the_dram_regime_alone():
    assert workload.batches_by_graphs((32, 1, 64, 8), "dram") == [(1, 8), (32, 64)]
    assert workload.batches_by_graphs((64,), "dram") == [(64,)]
    assert workload.batches_by_graphs((32, 1), "hot") == [(32, 1)]


def test_a_place_has_one_table_in_whatever_order_its_batches_were_measured():
    def row(threads: int, batch: int) -> dict:
        speeds = {"gmac_per_s": 10.0 * batch, "gb_per_s": 1.0, "roofline_share": 0.5}
        return {
            "shape": "layer",
            "regime": "dram",
            "threads": threads,
            "batch": batch,
            "contender": "a",
            **speeds,
        }

    rows = [row(1, 1), row(2, 1), row(1, 32), row(2, 32)]
    document = {"rows": rows, "bars": [], "contenders": [], "predicted_cortex_a53": None}
    _, tables, _ = report.read_report({"report": "kernels", **document, "provenance": FACTS})
    speeds = [table for table in tables if table.title.startswith("layer")]
    assert [table.title.split(":")[0] for table in speeds] == [
        "layer, dram, 1 thread",
        "layer, dram, 2 threads",
    ]
    assert all(table.rows[0] == ["contender", "batch 1", "batch 32"] for table in speeds)
    for table in speeds:
        assert [cell.split(" ")[0] for cell in table.rows[1][1:]] == ["10.0", "320.0"]


def test_settings_are_tried_where_they_mean_something():
    assert [str(setting) for setting in settings_for(1, is_peer=False)] == ["no spinning"]
    assert [str(setting) for setting in settings_for(2, is_peer=True)] == [
        "no spinning",
        "spinning",
        "spinning, no prepacking",
    ]


def test_a_contender_that_is_wrong_or_cannot_load_is_reported_and_the_others_go_on():
    class Wrong(NBits):
        def product(self, x, operands, n):
            return -super().product(x, operands, n)

    wrong = Contender("ort-wrong", Wrong(4, 32))
    unloadable = Contender("ort-unloadable", NBits(4, 24))
    measurement = Measurement(
        Plan((parse_shape("96x64"),), (1,), (1,), ("hot",), seconds=0.01),
        [wrong, unloadable, PEERS[-1]],
        None,
        [StreamingRoofline(1_000_000)],
    )
    (cell,) = measurement.cells()
    assert {timing.contender.name for timing in cell.timings} == {"ort-fp32"}
    states = measurement.states
    assert [states[name].status for name in ("ort-wrong", "ort-unloadable", "ort-fp32")] == [
        "failed",
        "failed",
        "ok",
    ]
    assert "off by 2.0e+00" in (states["ort-wrong"].reason or "")


def _cell(threads: int, **ms: float) -> Cell:
    by_name = {contender.name: contender for contender in EVERY}
    timings = [
        Timing(by_name[name.replace("_", "-")], Setting(), 1_000_000, 1_000_000, value, [value] * 9)
        for name, value in ms.items()
    ]
    return Cell(parse_shape("layer"), "hot", threads, 1, timings)


def test_the_best_peer_of_decode_is_not_the_8_bit_one_and_may_use_fewer_threads():
    roofline = StreamingRoofline(1_000_000)
    for threads in (1, 2):
        roofline.sample(threads)
    one_thread = _cell(1, ours_2bit=2.0, ort_2bit_b128=3.0, ort_4bit_b32=2.5, ort_8bit_b128=1.0)
    two_threads = _cell(2, ours_2bit=1.0, ort_2bit_b128=3.5, ort_4bit_b32=2.6)
    bars = [compare(cell, [one_thread, two_threads], roofline) for cell in (one_thread, two_threads)]
    assert [bar and (bar["best_peer"], bar["best_peer_threads"]) for bar in bars] == [("ort-4bit-b32", 1)] * 2
    assert [bar and bar["speedup"] for bar in bars] == [1.25, 2.5]
    assert [bar and bar["met"] for bar in bars] == [False, True]
    assert compare(_cell(1, ours_2bit=2.0, ort_8bit_b128=1.0), [one_thread], roofline) is not None
    assert compare(_cell(1, ort_2bit_b128=2.0), [one_thread], roofline) is None


def test_bars_are_the_ones_that_were_promised():
    assert (bar_for("layer", "hot", 1, 1).speedup, bar_for("layer", "dram", 2, 1).speedup) == (2.0, 1.6)
    assert bar_for("layer", "dram", 1, 1).roofline_share == 0.75
    assert bar_for("layer", "dram", 2, 1).roofline_share is None
    assert [bar_for("layer", "hot", 2, batch).speedup for batch in (32, 64)] == [1.7, 1.7]
    assert (bar_for("896x896", "hot", 1, 1).speedup, bar_for("896x896", "hot", 1, 64).speedup) == (1.6, None)


def test_a_row_counts_multiply_adds_and_bytes():
    roofline = StreamingRoofline(1_000_000)
    roofline.sample(1)
    (row,) = rows(_cell(1, ort_2bit_b128=2.0), roofline)
    assert row["gmac_per_s"] == round(parse_shape("layer").weights / 2e-3 / 1e9, 3)
    assert row["gb_per_s"] == 0.5
    assert row["roofline_share"] == round(0.5 / roofline.gb_per_s(1), 4)


def test_the_roofline_is_a_bandwidth_and_its_median():
    roofline = StreamingRoofline(8_000_000)
    samples = [roofline.sample(1) for _ in range(3)]
    assert roofline.gb_per_s(1) == sorted(samples)[1]
    assert 0.01 < samples[0] < 10_000
    assert list(roofline.summary()) == ["1"]
    assert share(1e9, 0.1, 20.0) == 0.5
    with pytest.raises(KeyError):
        roofline.gb_per_s(2)


def test_the_roofline_of_a_file_reads_what_was_written(tmp_path):
    roofline = StreamingRoofline.of_mapped_file(tmp_path / "stream", 8_000_000)
    assert (tmp_path / "stream").stat().st_size == 8_000_000
    assert 0.01 < roofline.sample(2) < 10_000


def test_json_is_one_document_of_the_contract():
    names = "ort-2bit-b128,ort-4bit-b32,ours-2bit-function" + (",ours-2bit" if native.library_path() else "")
    result = CliRunner().invoke(command, ["kernels", *SMALL, "--contender", names, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    fields = {"k", "n", "batch", "threads", "regime", "contender", "gmac_per_s", "gb_per_s", "roofline_share"}
    assert all(fields <= set(row) for row in document["rows"])
    cells = {(row["contender"], row["batch"], row["k"], row["n"]) for row in document["rows"]}
    assert cells == set(itertools.product(names.split(","), (1, 3), (128,), (96,)))
    assert all(row["gmac_per_s"] > 0 and row["p10_ms"] <= row["p90_ms"] for row in document["rows"])
    streams = [document["provenance"][name]["1"] for name in ("stream_gb_per_s", "mapped_stream_gb_per_s")]
    assert min(streams) > 0
    for bar in document["bars"]:
        assert bar["mapped_stream_share"] == pytest.approx(
            bar["roofline_share"] * streams[0] / streams[1], rel=0.02
        )
    assert document["provenance"]["versions"]["onnxruntime"] == onnxruntime.__version__
    assert len(document["bars"]) == (2 if native.library_path() else 0)
    for page in (report.text(document), report.markdown(document)):
        assert "ort-2bit-b128" in page
        assert "128x96, hot, 1 thread" in page


def test_what_a_simulator_says_is_called_a_prediction():
    loop = {
        "op": "TernaryMatMul2x4",
        "packed_rows": 2,
        "tokens": 1,
        "predicted_macs_per_cycle": 3.6,
        "predicted_macs_per_cycle_bound": 4.5,
    }
    document = {"report": "kernels", "rows": [], "bars": [], "contenders": [], "provenance": FACTS}
    simulated = {"loops": [loop], "unavailable": None}
    _, tables, _ = report.read_report({**document, "predicted_cortex_a53": simulated})
    assert tables[-1].title.startswith("predicted: Cortex-A53")
    assert tables[-1].rows[1] == ["TernaryMatMul2x4, 2 packed rows x 1 tokens", "3.60", "4.50"]
    absent = {"loops": [], "unavailable": "Not found: llvm-mca."}
    _, tables, remarks = report.read_report({**document, "predicted_cortex_a53": absent})
    assert tables == []
    assert "no estimate for the Cortex-A53: Not found: llvm-mca." in remarks


def test_memory_is_streamed_in_the_dram_regime():
    arguments = ["--shape", "128x4096", "--batch", "1", "--threads", "1", "--quick", "--regime", "dram"]
    result = CliRunner().invoke(command, ["kernels", *arguments, "--contender", "ort-4bit-b128", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row["run_bytes"] >= workload.DRAM_BYTES


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "896"], "--shape 896 is not a shape"),
        (["--shape", "0x4"], "--shape 0x4 is not a shape"),
        (["--batch", "1,x"], "--batch 1,x is not a list of numbers"),
        (["--threads", "0"], "--threads takes numbers of 1 or more"),
        (["--regime", "warm"], "--regime warm is unknown"),
        (["--seconds", "0"], "--seconds is 0"),
        (["--contender", "llama"], "--contender llama is unknown here"),
    ],
)
def test_bad_options_are_one_sentence(arguments, sentence):
    result = CliRunner().invoke(command, ["kernels", *arguments])
    assert isinstance(result.exception, UserError)
    assert sentence in str(result.exception)


def test_without_a_library_ours_is_refused_by_name(monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    result = CliRunner().invoke(command, ["kernels", *SMALL, "--contender", "ours-2bit"])
    assert isinstance(result.exception, UserError)
    assert "needs the native library" in str(result.exception)


def test_the_scalar_reference_is_measured_only_when_asked_for():
    ours = contenders.variants_of(OURS[0], ["avx2", "reference"])
    assert [contender.name for contender in ours] == ["ours-2bit:avx2", "ours-2bit:reference"]
    assert [contender.name for contender in contenders.choose(ours, (), True)] == ["ours-2bit:avx2"]
    assert [contender.name for contender in contenders.choose(ours, ("ours-2bit:reference",), True)] == [
        ours[1].name
    ]
    assert not ours[1].takes_part("dram")
