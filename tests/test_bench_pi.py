"""`microvlm-bench pi` without an emulator: predictions by hand, profiles, the fit, the gate, a board's files."""

from __future__ import annotations

import io
import json
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from document_mutations import check_mutations
from PIL import Image

from microvlm.backends.arm64.transports import device_package
from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.equivalence import equivalence_bench
from microvlm.bench.pi import (
    calibrate,
    count_baseline,
    predict,
    profiles,
    published_results,
    real_board,
)
from microvlm.bench.pi.counting.count_marks import mapped_range
from microvlm.bench.pi.counting.counting_emulator import Region, parse_counts
from microvlm.bench.pi.counting.emulated_package import compiler_of
from microvlm.bench.pi.counting.instruction_cost import Cost, Counted, weight_bytes
from microvlm.bench.pi.counting.kernel_cycles import Block, Step
from microvlm.bench.pi.pi_bench import _byte_bars, bundle_name
from microvlm.bench.pi.workload_phases import PHASES, Scenario, jpeg
from microvlm.errors import UserError

PROVENANCE = {"cpu": "c", "date_utc": "d", "versions": {}, "model": {"name": "nano"}}
NUMBERS = {
    "cores": 4.0,
    "clock_hz": 1e9,
    "kernel_ipc": 2.0,
    "scalar_ipc": 0.5,
    "bandwidth_low_bytes_per_s": 0.8e9,
    "bandwidth_high_bytes_per_s": 1.6e9,
    "storage_bytes_per_s": 20e6,
    "ram_bytes": 512e6,
}
ENTRIES = {name: profiles.Number(value, "assumed", "a test") for name, value in NUMBERS.items()}
BOARD = profiles.Profile("a board", "cortex-a53", False, profiles.Numbers(**ENTRIES))
COSTS = (
    Cost("load", 500_000_000, 0, 0, 0, 0),
    Cost("vision", 300_000_000, 0, 8_000_000, 200_000_000, 0),
    Cost("prefill", 1_010_000_000, 0, 80_000_000, 1_000_000_000, 0),
    Cost("decode", 110_000_000, 0, 80_000_000, 100_000_000, 0),
)


def test_predicted_times_are_those_calculated_by_hand():
    predictions = {
        prediction.phase: prediction
        for prediction in predict.predict(COSTS, BOARD, Scenario(15, 50), 200_000_000)
    }
    # Kernels 1e8 / 2e9 = 50 ms; 80 MB take 100 ms at .8 GB/s and 50 at 1.6; the rest 1e7 / .5e9 = 20 ms.
    assert predictions["decode"].at_low_ms == pytest.approx(100 + 20)
    assert predictions["decode"].at_high_ms == pytest.approx(50 + 20)
    # Bound by arithmetic at both ends: 1e9 / 2e9 = 500 ms, and 20 ms.
    assert predictions["prefill"].at_low_ms == predictions["prefill"].at_high_ms == pytest.approx(520)
    # 2e8 / 2e9 = 100 ms against 10 ms of bytes, and 1e8 / .5e9 = 200 ms.
    assert predictions["vision"].at_low_ms == pytest.approx(300)
    assert predictions["first_token"].at_low_ms == pytest.approx(820)
    assert predictions["answer"].at_low_ms == pytest.approx(820 + 49 * 120)
    assert predictions["answer"].at_high_ms == pytest.approx(820 + 49 * 70)
    # 5e8 / .5e9 = 1 s to load, 200 MB at 20 MB/s from the card.
    assert predictions["answer_cold"].at_low_ms == pytest.approx(1000 + 10_000 + 6700)
    assert predictions["decode"].row() == {"phase": "decode", "low": 70.0, "high": 120.0}
    assert "answer_from_file" not in predictions, "no decoding of a picture was counted"


def test_times_by_a_table_of_timings_take_its_cycles_on_all_cores():
    costs = [replace(cost, predicted_timings_kernel_cycles=2 * cost.kernel_instructions) for cost in COSTS]
    (by_timings,) = predict.predict_by_tables(costs, BOARD, Scenario(15, 50), 1).values()
    times = {prediction.phase: prediction for prediction in by_timings}
    # 2e8 cycles on 4 cores of 1e9 Hz = 50 ms, 80 MB as above, and 1e7 / .5e9 = 20 ms.
    assert times["decode"].at_low_ms == pytest.approx(100 + 20)
    assert times["decode"].at_high_ms == pytest.approx(50 + 20)
    assert times["vision"].at_low_ms == pytest.approx(100 + 200)
    assert predict.predict_by_tables(COSTS, BOARD, Scenario(15, 50), 1) == {}, "no cycles are known"


def test_an_answer_from_a_file_decodes_the_picture_first():
    costs = (*COSTS, Cost("picture", 50_000_000, 0, 0, 0, 0))
    predictions = {
        prediction.phase: prediction for prediction in predict.predict(costs, BOARD, Scenario(15, 50), 1)
    }
    assert predictions["picture"].at_low_ms == pytest.approx(100)
    assert predictions["answer_from_file"].at_low_ms == pytest.approx(100 + predictions["answer"].at_low_ms)


def test_the_decoded_picture_is_a_photograph_of_three_megapixels():
    with Image.open(io.BytesIO(jpeg())) as picture:
        assert picture.format == "JPEG"
        assert picture.width * picture.height == 3 * 2**20
        assert picture.entropy() > 6, "detail costs a decoder time"


def test_bars_are_read_at_their_end_of_the_bandwidth():
    first = predict.Predicted("first_token", 2600, 2400)
    met = [bar["met"] for bar in predict.bars([first, predict.Predicted("answer", 9900, 7100)])]
    assert met == [True, False, False]


def test_every_number_of_every_board_has_a_source():
    assert profiles.profile_names() == ["pi3", "pi4", "pi5", "zero2w"]
    for name in profiles.profile_names():
        profile = profiles.load_profile(name)
        assert not profile.calibrated, name
        assert profile["bandwidth_low_bytes_per_s"] < profile["bandwidth_high_bytes_per_s"]
        entries = [profile.entry(number) for number in profiles.NUMBERS]
        assert all(len(entry.source) > 5 for entry in entries)
        assert "measured" not in [entry.basis for entry in entries], "nobody calibrated"
    zero = profiles.load_profile("zero2w")
    assert (zero["bandwidth_low_bytes_per_s"], zero["bandwidth_high_bytes_per_s"]) == (0.8e9, 1.3e9)


@pytest.mark.parametrize("name", profiles.profile_names())
def test_the_table_says_which_numbers_are_assumed_and_where_the_others_come_from(name):
    profile = profiles.load_profile(name)
    document = {
        "report": "pi",
        "target": "emulated",
        "profile": profile.document(),
        "model": published_results.fit_document(),
        "provenance": PROVENANCE,
    }
    tables = {table.title: table.rows for table in report.read_report(document).tables}
    board = tables[f"{profile.name}, as the predictions take it"]
    assert board[0] == ["number", "value", "it is", "source"]
    assert [(row[0], row[2], row[3]) for row in board[1:]] == [
        (number, profile.entry(number).basis, profile.entry(number).source) for number in profiles.NUMBERS
    ]
    assert any(row[2] == "assumed" for row in board)
    assert all(row[-1] for row in tables["the model behind the predictions"]), "an anchor without a source"


def test_counts_of_another_core_than_the_boards_are_pointed_out():
    document = {
        "report": "pi",
        "target": "emulated:cortex-a53",
        "model": published_results.fit_document(),
        "provenance": PROVENANCE,
        "cost": [],
        "counted_on": {"cpu": "cortex-a53"},
    }
    for name, remarks in (("zero2w", 2), ("pi5", 3)):
        document["profile"] = profiles.load_profile(name).document()
        assert len(report.read_report(document).remarks) == remarks


def test_a_number_that_does_not_say_what_it_rests_on_is_refused(tmp_path):
    document = profiles.load_profile("zero2w").document()
    document["numbers"]["scalar_ipc"]["basis"] = "known"
    path = tmp_path / "board.json"
    path.write_text(json.dumps(document))
    with pytest.raises(
        UserError,
        match=r"'numbers\.scalar_ipc': its basis is 'known'; a number is published, fitted, assumed or measured",
    ):
        profiles.load_profile(str(path))


def test_the_model_gives_its_anchors_back_and_says_how_wrong_it_is_elsewhere():
    fit = published_results.fit_document()
    assert fit["kernel_ipc"] == profiles.load_profile("zero2w")["kernel_ipc"]
    # By hand: 30 layers x (2,654,208 - 55,296 at 1.463 + 55,296 at .883 + 884,736 at .9965) instructions a token.
    layer = (2_654_208 - 55_296) * 1.463 + 55_296 * 0.883 + 884_736 * 0.9965
    assert fit["kernel_ipc"] == pytest.approx(30 * layer * 180**0.5 / 1e9, rel=1e-3)
    assert [abs(anchor["error"]) < 0.01 for anchor in fit["anchors"]] == [True, True]
    held_out = fit["held_out"]
    assert held_out["error"] == pytest.approx(held_out["predicted_tokens_per_s"] / 2.6 - 1, abs=2e-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{}", "'name' is missing"),
        ("nothing", "is not valid JSON"),
        (
            '{"name": "x", "cpu": "y", "calibrated": false, "numbers": {"cores": 4}}',
            "'numbers.cores' must be an",
        ),
    ],
)
def test_a_bad_profile_is_refused(tmp_path, text, sentence):
    path = tmp_path / "board.json"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        profiles.load_profile(str(path))
    with pytest.raises(UserError, match="pi3, pi4, pi5, zero2w"):
        profiles.load_profile("pi9")


@pytest.mark.parametrize("name", profiles.profile_names())
def test_every_changed_profile_is_a_profile_or_one_sentence(name, tmp_path):
    path = tmp_path / "board.json"

    def read(content):
        path.write_bytes(content)
        profile = profiles.load_profile(str(path))
        predict.predict(COSTS, profile, Scenario(15, 50), 200_000_000)

    assert check_mutations(profiles.load_profile(name).document(), read) > 400


def test_every_changed_baseline_is_a_baseline_or_one_sentence(tmp_path):
    path = tmp_path / "nano-cortex-a53.json"
    document = json.loads((count_baseline.FOLDER / path.name).read_text())
    key = document["key"]
    cost = Cost("decode", 10_000_000, 5_000_000, 0, 0, 0)

    def read(content):
        path.write_bytes(content)
        sentences = count_baseline.check("nano", key, [cost], tmp_path)
        assert all(sentence.isprintable() for sentence in sentences)
        count_baseline.load(path)

    assert check_mutations(document, read) > 400


KEY = {
    "graphs": "g",
    "cpu": "cortex-a53",
    "compiler": "clang 22.1.8",
    "onnxruntime": "1.32.0",
    "numpy": "2.4.6",
    "python": "3.11",
    "system": "debian 12",
}


def test_the_gate_names_the_phase_that_changed(tmp_path):
    cost = Cost("decode", 10_000_000, 5_000_000, 0, 0, 0)
    path = count_baseline.write("nano", KEY, [cost], tmp_path)
    assert count_baseline.check("nano", KEY, [cost], tmp_path) == []
    small = Cost("decode", 10_049_000, 5_000_000, 0, 0, 0)
    assert count_baseline.check("nano", KEY, [small], tmp_path) == []
    more = Cost("decode", 10_051_000, 5_000_000, 0, 0, 0)
    assert count_baseline.check("nano", KEY, [more], tmp_path) == [
        "decode: 10,051,000 instructions instead of 10,000,000 (+0.5%)"
    ]
    fewer = Cost("decode", 10_000_000, 4_000_000, 0, 0, 0)
    assert count_baseline.check("nano", KEY, [fewer], tmp_path) == [
        "decode: 4,000,000 simd instead of 5,000,000 (-20.0%)"
    ]
    other_key = {**KEY, "compiler": "gcc 12.2.0"}
    assert count_baseline.check("nano", other_key, [cost], tmp_path) == [
        "the baseline is for another compiler: 'clang 22.1.8' there, 'gcc 12.2.0' here"
    ]
    path.unlink()
    assert count_baseline.check("photo", KEY, [cost], tmp_path) == [
        "there is no baseline for photo on cortex-a53: "
        "give --update-baseline in place of --gate, which writes photo-cortex-a53.json"
    ]


def test_a_baseline_is_named_after_its_model_and_base_3_has_its_own():
    names = [bundle_name(model) for model in ("nano", "/elsewhere/nano-1.58bit", "full", "full-base3")]
    assert names == ["nano", "nano", "full", "full-base3"]


def test_a_baseline_depends_on_neither_weights_nor_what_follows_the_graphs(tiny_bundle, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest["fingerprint"] = "another"
    for entry in manifest["files"].values():
        entry["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "config.json").write_text((tiny_bundle / "config.json").read_text())
    config = json.loads((copy / "config.json").read_text())
    config["memory"]["pointing"] = {"threshold": 0.5, "weights": {"constant": 1.0}}
    (copy / "config.json").write_text(json.dumps(config))
    assert count_baseline.graphs_hash(copy) == count_baseline.graphs_hash(tiny_bundle)
    manifest["packing"] = "base3"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert count_baseline.graphs_hash(copy) != count_baseline.graphs_hash(tiny_bundle)


def test_a_decoded_token_reads_the_decoder_and_the_whole_table(tiny_bundle):
    folder = tiny_bundle / "onnx"
    names = ("decoder_model_merged.onnx", "decoder_model_merged.data", "embedding.data")
    expected = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    assert weight_bytes(tiny_bundle, "decode") == weight_bytes(tiny_bundle, "prefill") == expected > 0


def test_the_bytes_of_a_token_are_held_to_their_bars_with_the_cut_table_and_with_the_whole_one(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "embedding.data").write_bytes(bytes(50_000 * 480))
    counts = Counted((Cost("decode", 1, 0, 96_000_000, 0, 0),), {})
    assert [
        (bar["value"], bar["at_most"], bar["met"]) for bar in _byte_bars(counts, "full-base3", tmp_path)
    ] == [
        (96_000_000, 99_000_000, True),
        (96_000_000 + (151_936 - 50_000) * 480, 150_000_000, True),
    ]
    heavy = Counted((Cost("decode", 1, 0, 118_000_001, 0, 0),), {})
    assert [bar["met"] for bar in _byte_bars(heavy, "full", tmp_path)] == [False, True]


def test_what_the_counter_prints_is_read():
    text = "noise\ninstruction-count region=2 total=9 simd=4 multiply=2 crypto=0 library=3\n"
    assert parse_counts(text) == {2: Region(9, 4, 2, 0, 3)}
    listed = f"{text}executed-block id=1 address=8 words=c0035fd6\nexecuted-step region=2 before=0 block=1 times=3\n"
    assert parse_counts(listed)[2].steps == (Step(None, Block(8, bytes.fromhex("c0035fd6")), 3),)
    maps = "7f00-7f10 r-xp 0 0:0 1 /x/lib.so\n7f20-7f30 rw-p 0 0:0 1 /x/lib.so\n7f40-7f50 r-xp 0 0:0 1 /x/other.so\n"
    assert mapped_range(Path("/x/lib.so"), maps) == (0x7F00, 0x7F30)
    assert mapped_range(Path("/x/none.so"), maps) == (0, 0)
    assert compiler_of(b"\0GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0") == "gcc 12.2.0"
    assert compiler_of(b"\0clang version 22.1.8\0") == "clang 22.1.8"


@pytest.fixture
def board_files(tmp_path):
    """The files of a Raspberry Pi Zero 2 W, as Raspberry Pi OS shows them."""
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("47236\n")
    (zone / "type").write_text("cpu-thermal\n")
    for core in range(4):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text("600000\n")
        (folder / "cpuinfo_max_freq").write_text("1000000\n")
        (folder / "scaling_governor").write_text("ondemand\n")
    throttled = tmp_path / real_board.THROTTLED_FILE
    throttled.parent.mkdir(parents=True)
    throttled.write_text("50005\n")
    return tmp_path


@pytest.mark.posix
def test_heat_clock_and_throttling_are_read(board_files, tmp_path_factory):
    assert real_board.conditions(board_files) == {
        "temperatures_celsius": {"cpu-thermal": 47.236},
        "clock_hz": {f"cpu{core}": 600_000_000 for core in range(4)},
        "clock_limit_hz": {f"cpu{core}": 1_000_000_000 for core in range(4)},
        "governor": "ondemand",
    }
    meaning = ["under-voltage now", "throttled now", "under-voltage happened", "throttling happened"]
    assert real_board.throttling(board_files) == {"value": 0x50005, "meaning": meaning}
    empty = tmp_path_factory.mktemp("empty")
    program = empty / "vcgencmd"
    program.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x80000\n')
    program.chmod(0o755)
    assert real_board.throttling(empty, str(program)) == {
        "value": 0x80000,
        "meaning": ["soft temperature limit happened"],
    }
    assert real_board.conditions(empty)["temperatures_celsius"] == {}


@pytest.mark.usefixtures("native_library")
def test_this_machine_can_be_calibrated(board_files, tmp_path, tiny_bundle):
    """The test checks the source of the numbers: by these files, this machine's clock is a Raspberry Pi's."""
    like = profiles.load_profile("zero2w")
    document = calibrate.calibrate(like, root=board_files, array_bytes=4_000_000, model=str(tiny_bundle))
    path = tmp_path / "mine.json"
    calibrate.write(document, path)
    mine = profiles.load_profile(str(path))
    assert mine.calibrated
    assert mine["clock_hz"] == 1e9
    assert mine["bandwidth_low_bytes_per_s"] == pytest.approx(
        min(document["stream_gb_per_s"].values()) * 1e9, rel=1e-2
    )
    assert mine.entry("kernel_ipc").basis == mine.entry("clock_hz").basis == "measured"
    assert mine.entry("storage_bytes_per_s").basis == "assumed"
    assert mine.entry("storage_bytes_per_s").source.startswith("Raspberry Pi Zero 2 W: ")
    timed = {(row["op"], row["tokens"]) for row in document["operators"]}
    assert timed == {(op, tokens) for op in calibrate.OPERATORS for tokens in (1, 32)}
    slowest = calibrate.kernel_ipc(document["operators"], 1e9)
    assert mine["kernel_ipc"] == pytest.approx(slowest * mine["cores"])
    assert document["conditions"]["throttling"]["value"] == 0x50005


@pytest.mark.linux
def test_the_phases_are_timed_on_a_target(tiny_bundle):
    """`local` is a child process of this machine, whatever that is."""
    arguments = ["pi", str(tiny_bundle), "--target", "local", "--part", "cost", "--repeats", "2", "--json"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["target"] == "local"
    assert [row["phase"] for row in document["measured_ms"]] == list(PHASES)
    assert all(row["median_ms"] > 0 and row["repeats"] == 2 for row in document["measured_ms"])
    assert document["board"]["before"]["peak_rss_bytes"] > 0
    assert not {"cost", "predicted_ms"} & set(document), "nothing was counted"


@pytest.mark.posix
def test_replay_reaches_through_the_link_to_a_device(speaking_bundle, monkeypatch):
    monkeypatch.setenv("MICROVLM_TARGET", "local")
    options = equivalence_bench.Options(
        str(speaking_bundle),
        reference="ort",
        candidate="ort-arm64",
        images=1,
        scenes=0,
        threads=1,
        new_tokens=4,
    )
    document, verdict = equivalence_bench.run(options)
    assert verdict.verdict != "FAIL", verdict.reasons
    assert document["integer_exact"] is True
    assert document["replay"]["sums"] > 10_000
    assert document["replay"]["codes_differing"] == 0, "the same machine rounds alike"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--part", "speed"], "--part speed is unknown"),
        (["--images", "0"], "--images is 0"),
        (["--answer-tokens", "0"], "--answer-tokens is 0"),
        (["--profile", "pi9"], "--profile 'pi9' is neither a file nor a board"),
        (["--target", "moon"], "--target"),
        (["--gate", "--update-baseline"], "exclude each other"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tiny_bundle):
    result = CliRunner().invoke(command, ["pi", str(tiny_bundle), *arguments])
    assert isinstance(result.exception, UserError), result.output
    assert sentence in str(result.exception)


@pytest.fixture
def path_without_compiler(tmp_path, monkeypatch):
    """Folder on PATH in place of all others, with an emulator and a compiler for this machine alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("qemu-aarch64", "qemu-aarch64-static", "cc"):
        (folder / program).write_text("#!/bin/sh\nexit 1\n")
        (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv(device_package.SWITCH, raising=False)
    return folder


@pytest.mark.usefixtures("path_without_compiler")
@pytest.mark.parametrize("installed", [True, False], ids=["an installed wheel", "a checkout"])
def test_a_machine_without_the_library_for_a_board_says_at_once_how_to_get_it(
    installed, tmp_path, monkeypatch
):
    if installed:
        # A wheel holds the library of its own machine and no C++.
        site = tmp_path / "site"
        site.mkdir()
        (site / "libmicrovlm_ops.so").write_bytes(b"x86-64")
        monkeypatch.setattr(device_package.native, "__file__", str(site / "__init__.py"))
    began = time.perf_counter()
    for part in ([], ["--part", "cost"], ["--part", "peers"]):
        result = CliRunner().invoke(command, ["pi", "nano", "--target", "emulated", *part])
        assert isinstance(result.exception, UserError), result.output
        sentence = str(result.exception)
        assert "counting instructions needs this package's native library for aarch64" in sentence
        assert "bash .ci/nox -s wheels" in sentence
        assert "MICROVLM_WHEEL" in sentence
        assert "apt-get install g++-aarch64-linux-gnu" in sentence
    assert time.perf_counter() - began < 1


def test_a_machine_that_cannot_count_says_at_once_what_is_missing(path_without_compiler):
    for program, package in (("cc", "gcc"), ("qemu-aarch64", "qemu-user")):
        (path_without_compiler / program).unlink()
        result = CliRunner().invoke(command, ["pi", "nano", "--target", "emulated"])
        assert isinstance(result.exception, UserError)
        assert f"apt-get install {package}." in str(result.exception)


def test_a_wheel_without_a_library_is_refused_before_counting(tmp_path, monkeypatch, path_without_compiler):
    wheel = tmp_path / "microvlm-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("microvlm/__init__.py", "")
    monkeypatch.setenv(device_package.SWITCH, str(wheel))
    result = CliRunner().invoke(command, ["pi", "nano", "--target", "emulated"])
    assert isinstance(result.exception, UserError)
    assert "microvlm-0.1.0-py3-none-any.whl has none" in str(result.exception)
