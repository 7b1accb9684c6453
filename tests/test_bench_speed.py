"""`microvlm-bench run` with real worker processes: the document, backends that cannot run, workers that die."""

from __future__ import annotations

import json
import mmap
import platform
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from microvlm.backends import get_backend
from microvlm.bench import provenance, report
from microvlm.bench.bench_command import command
from microvlm.bench.pi import count_baseline, emulated_entry
from microvlm.bench.speed.harness import (
    BackendRun,
    Memory,
    PhaseTime,
    Plan,
    WorkerFailed,
    WorkerProcess,
    measure,
)
from microvlm.bench.speed.phases import PHASES, phases_to_run
from microvlm.bench.speed.speed_bench import ratios
from microvlm.bench.speed.speed_bench import run as run_speed_bench
from microvlm.errors import UserError

THIRD_PARTY = """
import os
from microvlm.backends import Backend
from microvlm.errors import UserError

class Absent(Backend):
    name = "absent"
    def unavailable(self):
        return "this machine has no such chip; buy one."
    def load(self, source, threads=None, **options):
        raise AssertionError("asked to load although unavailable")

class Refusing(Absent):
    def unavailable(self):
        return None
    def load(self, source, threads=None, **options):
        raise UserError("this model is too large for the chip; export it smaller.")

class Crashing(Refusing):
    def load(self, source, threads=None, **options):
        print("noise on stdout")
        raise RuntimeError("the chip caught fire")
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with three backends: its files and its entry points, on the path of all processes."""
    site = tmp_path / "site"
    info = site / "elsewhere-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "elsewhere_backends.py").write_text(THIRD_PARTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    classes = ("Absent", "Refusing", "Crashing")
    points = [f"{name.lower()} = elsewhere_backends:{name}" for name in classes]
    (info / "entry_points.txt").write_text("[microvlm.backends]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "elsewhere_backends", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")


def bench(*arguments: str) -> tuple[int, dict, str]:
    result = CliRunner().invoke(command, ["run", *arguments, "--json"], standalone_mode=False)
    assert result.exception is None, result.output
    return result.return_value, json.loads(result.stdout), result.stderr


@pytest.mark.usefixtures("third_party")
@pytest.mark.linux
def test_every_phase_is_measured_and_backends_that_cannot_run_are_listed_with_the_reason(
    speaking_bundle: Path,
) -> None:
    quick = ("--repeats", "2", "--warmup", "1", "--new-tokens", "2")
    names = ("ort", "absent", "refusing", "crashing")
    chosen = [argument for name in names for argument in ("--backend", name)]
    status, document, messages = bench(str(speaking_bundle), *chosen, *quick)
    ort, absent, refusing, crashing = document["results"]
    assert [entry["backend"] for entry in document["results"]] == list(names)
    assert list(ort["phases"]) == list(PHASES)
    for phase in ort["phases"].values():
        assert 0 < phase["median_ms"] <= phase["p90_ms"]
    assert ort["phases"]["vision"]["repeats"] == 2
    assert ort["decode_tokens_per_s"] == pytest.approx(1e3 / ort["phases"]["decode"]["median_ms"], rel=1e-3)
    assert ort["peak_rss_bytes"] > ort["anonymous_bytes"] > 1_000_000
    assert ort["file_backed_bytes"] > 1_000_000
    assert ort["path"] == get_backend("ort").kernels()
    assert (absent["status"], absent["reason"]) == ("skipped", "this machine has no such chip; buy one.")
    assert (refusing["status"], refusing["phases"]) == ("skipped", {})
    assert "too large for the chip" in refusing["reason"]
    assert crashing["status"] == "failed"
    assert crashing["reason"] == "its process ended with status 1: RuntimeError: the chip caught fire"
    assert "Traceback" not in messages
    assert status == 1
    table = report.text(document)
    assert "absent skipped: this machine has no such chip" in table
    assert "end_to_end" in table
    facts = document["provenance"]
    assert facts["model"]["files"]["manifest.json"] > 0
    assert len(facts["model"]["sha256"]) == 64
    assert facts["threads"] == 1
    assert facts["versions"]["onnxruntime"]
    assert ort["weight_bytes_per_token"] > 10_000
    assert ort["predicted_ceiling_tokens_per_s"] > ort["decode_tokens_per_s"]


@pytest.mark.usefixtures("third_party")
def test_without_a_choice_every_registered_backend_is_listed_even_one_that_does_not_import(
    tmp_path: Path,
) -> None:
    (tmp_path / "site" / "elsewhere_backends.py").write_text("import a_package_that_nobody_has\n")
    runs = measure(["absent"], [tmp_path], Plan({}, threads=1))
    assert runs[0].status == "skipped"
    assert "backend 'absent' cannot be imported" in runs[0].reason
    with pytest.raises(UserError, match="unknown backend"):
        measure(["nobody"], [tmp_path], Plan({}, threads=1))


@pytest.mark.usefixtures("third_party")
def test_a_skipped_backend_is_no_failure_but_no_backend_at_all_is(speaking_bundle: Path) -> None:
    status, document, _ = bench(str(speaking_bundle), "--backend", "absent")
    assert status == 1
    assert document["results"][0]["status"] == "skipped"
    assert document["results"][0]["decode_tokens_per_s"] is None


def test_an_unknown_backend_and_bad_numbers_are_one_sentence(speaking_bundle: Path) -> None:
    for arguments, sentence in (
        (["--backend", "nobody"], "unknown backend 'nobody'"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--new-tokens", "0"], "--new-tokens is 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            command.main(["run", str(speaking_bundle), *arguments], standalone_mode=False)


def test_a_worker_that_is_killed_is_a_sentence_with_its_signal() -> None:
    worker = WorkerProcess([sys.executable, "-c", "import os; input(); os.kill(os.getpid(), 9)"])
    with pytest.raises(WorkerFailed, match="was ended by signal 9: it said nothing"):
        worker.ask(Memory, do="load")
    worker.close()


@pytest.mark.linux
def test_a_worker_is_the_installed_package_whatever_lies_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "microvlm").mkdir()
    (tmp_path / "microvlm" / "__init__.py").write_text("raise SystemExit('the wrong microvlm')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    worker = WorkerProcess()
    assert worker.ask(Memory, do="memory").keys() >= {"peak_rss_bytes", "anonymous_bytes"}
    worker.close()


def test_a_worker_that_says_much_on_stderr_does_not_hang() -> None:
    program = "import sys; input(); sys.stderr.write('x' * 1_000_000); print('{\"ms\": 1}', flush=True)"
    worker = WorkerProcess([sys.executable, "-c", program])
    assert worker.ask(PhaseTime, do="phase") == PhaseTime(1)
    worker.close()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("Segmentation fault", "not valid JSON"),
        ("[1]", "must be an object, not a list"),
        ('{"ms": null}', "'ms' must be a number, not null"),
        ('{"ms": 1e400}', "'ms'"),
        ('{"error": 5}', "'error' must be"),
        ('{"error": "no\\u001b[31m"}', r"no\\x1b\[31m"),
        ("{}", "'ms' is missing"),
    ],
)
def test_a_worker_that_answers_wrongly_is_a_sentence(line: str, sentence: str) -> None:
    worker = WorkerProcess([sys.executable, "-c", f"input(); print({line!r}, flush=True)"])
    with pytest.raises(WorkerFailed, match=sentence) as failure:
        worker.ask(PhaseTime, do="phase")
    assert str(failure.value).isprintable()
    worker.close()


def test_backends_take_turns_in_every_phase_of_every_round(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = textwrap.dedent(f"""
        import json, sys
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "load":
                name = request["backend"]
            if request["do"] == "phase":
                with open({str(log)!r}, "a") as file:
                    print(name, request["phase"], request["index"], file=file)
            print(json.dumps({{"load_ms": 1.0, "import_ms": 1.0, "ms": 1.0}}), flush=True)
    """)
    plan = Plan({}, threads=1, repeats=2, warmup=1, loads=1)
    runs = measure(
        ["ort", "torch"], [tmp_path], plan, spawn=lambda: WorkerProcess([sys.executable, "-c", program])
    )
    expected = [
        f"{backend} {phase} {index}"
        for index in range(3)
        for phase in phases_to_run()
        for backend in ("ort", "torch")
    ]
    assert log.read_text().splitlines() == expected
    assert all(len(run.milliseconds["vision"]) == 2 for run in runs)


def test_two_models_are_timed_in_turns_and_told_apart(tmp_path: Path, speaking_bundle: Path) -> None:
    other_bundle = tmp_path / "other"
    shutil.copytree(speaking_bundle, other_bundle)
    quick = ("--repeats", "1", "--warmup", "0", "--new-tokens", "1", "--backend", "ort")
    status, document, _ = bench(str(speaking_bundle), str(other_bundle), *quick)
    assert status == 0
    assert [entry["label"] for entry in document["results"]] == [f"{speaking_bundle.name}, ort", "other, ort"]
    assert {entry["against"] for entry in document["ratios"]} == {f"{speaking_bundle.name}, ort"}
    first, second = document["provenance"]["models"]
    assert first["sha256"] == second["sha256"]


def test_a_damaged_bundle_is_one_sentence(tmp_path: Path, speaking_bundle: Path) -> None:
    damaged_bundle = tmp_path / "damaged"
    shutil.copytree(speaking_bundle, damaged_bundle)
    (damaged_bundle / "onnx" / "memory_read.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes"):
        command.main(["run", str(damaged_bundle)], standalone_mode=False)


def test_ratios_are_against_the_first_backend_that_ran() -> None:
    runs = [
        BackendRun("broken", label="broken", status="failed", reason="it broke"),
        BackendRun("slow", label="slow", milliseconds={"decode": [4.0, 4.0, 8.0]}),
        BackendRun("fast", label="fast", milliseconds={"decode": [2.0, 2.0, 4.0]}),
    ]
    assert ratios(runs) == [
        {"phase": "decode", "backend": "fast", "against": "slow", "value": 0.5, "low": 0.5, "high": 0.5}
    ]


@pytest.mark.linux
def test_anonymous_and_file_backed_memory_are_told_apart(tmp_path: Path) -> None:
    size = 40_000_000
    np.zeros(size, np.uint8).tofile(tmp_path / "weights")
    before = provenance.memory_of_this_process()
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    mapped.sum()
    after_mapping = provenance.memory_of_this_process()
    # From the kernel, and not from what earlier tests freed to the allocator.
    array = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array += 1
    after_holding = provenance.memory_of_this_process()
    assert after_mapping["file_backed_bytes"] - before["file_backed_bytes"] > 0.9 * size
    assert after_holding["anonymous_bytes"] - after_mapping["anonymous_bytes"] > 0.9 * size
    assert after_holding["peak_rss_bytes"] >= after_holding["rss_bytes"]
    assert array.sum() == size


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without QEMU, ssh or a compiler."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("MICROVLM_TARGET", "MICROVLM_WHEEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speaking_bundle: Path) -> None:
    """The only committed baseline is one of the test bundle's graphs, with nano's counts."""
    nano = json.loads((count_baseline.FOLDER / "nano-cortex-a53.json").read_text())
    nano["key"]["graphs"] = count_baseline.graphs_hash(speaking_bundle)
    folder = tmp_path / "baselines"
    folder.mkdir()
    (folder / "other-cortex-a53.json").write_text(json.dumps(nano))
    monkeypatch.setattr(count_baseline, "FOLDER", folder)


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine times ort-arm64 itself")
@pytest.mark.usefixtures("no_programs", "baseline")
def test_an_emulated_backend_has_counts_and_predictions_and_no_measured_time(speaking_bundle: Path) -> None:
    status, document, _ = bench(str(speaking_bundle), "--backend", "ort-arm64")
    assert status == 0
    (entry,) = document["results"]
    assert (entry["status"], entry["phases"], entry["decode_tokens_per_s"]) == ("counted", {}, None)
    emulated = entry["emulated"]
    nano = json.loads((count_baseline.FOLDER / "other-cortex-a53.json").read_text())["phases"]
    instructions = {phase: figures["instructions"] for phase, figures in nano.items()}
    assert emulated["counted_instructions"]["decode"] == instructions["decode"]
    assert (
        emulated["counted_instructions"]["memory_write"]
        == 2 * instructions["memory_encode"] + instructions["memory_write"]
    )
    assert 0 < emulated["predicted_ms"]["decode"]["low"] <= emulated["predicted_ms"]["decode"]["high"]
    assert "the committed baseline of these graphs" in emulated["counts_from"]
    # Nothing emulates here: the equivalence is what is missing.
    assert emulated["equivalence"] is None
    assert "apt-get install qemu-user-static" in entry["reason"]
    table = report.text(document)
    head = next(line for line in table.splitlines() if line.startswith("phase"))
    assert "ort-arm64: M instructions" in head
    assert "ort-arm64: predicted ms" in head
    assert "no time of it was measured" in table


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine times ort-arm64 itself")
@pytest.mark.usefixtures("no_programs")
def test_without_a_baseline_and_an_emulator_a_line_says_what_is_missing(speaking_bundle: Path) -> None:
    status, document, _ = bench(str(speaking_bundle), "--backend", "ort-arm64")
    assert status == 1
    (entry,) = document["results"]
    assert entry["status"] == "skipped"
    assert (
        "no instructions counted: QEMU that loads plugins was not found: apt-get install qemu-user."
        in entry["reason"]
    )
    assert "no equivalence checked: " in entry["reason"]


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine times ort-arm64 itself")
@pytest.mark.usefixtures("no_programs", "baseline")
def test_an_emulated_backend_that_is_another_model_fails_the_run(
    speaking_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = {
        "against": "ort",
        "verdict": "FAIL",
        "reasons": ["sums differ"],
        "sums": 2,
        "sums_differing": 1,
    }
    monkeypatch.setattr(emulated_entry, "_equivalence", lambda *_: compared)
    status, document, _ = bench(str(speaking_bundle), "--backend", "ort-arm64")
    assert status == 1
    assert (document["results"][0]["status"], document["results"][0]["reason"]) == ("failed", "sums differ")
    assert "FAIL, 1 of 2 integer sums equal" in report.text(document)


def test_a_device_is_timed_and_its_memory_is_the_workers_there(
    speaking_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`local` is a worker process behind the same link as a device over ssh."""
    monkeypatch.setenv("MICROVLM_TARGET", "local")
    quick = ("--repeats", "1", "--warmup", "0", "--new-tokens", "1")
    status, document, _ = bench(str(speaking_bundle), "--backend", "ort-arm64", *quick)
    assert status == 0
    (entry,) = document["results"]
    assert entry["status"] == "ok"
    assert list(entry["phases"]) == list(PHASES)
    assert "emulated" not in entry
    assert "local" in entry["path"]
    assert entry["peak_rss_bytes"] > entry["anonymous_bytes"] > 1_000_000


def test_a_device_is_for_torch_alone_and_must_be_there():
    with pytest.raises(UserError, match="--device cuda is for backend torch alone: give --backend torch too"):
        run_speed_bench(["nano"], device="cuda")
    with pytest.raises(UserError, match="device 'nowhere' is not available here"):
        get_backend("torch").load("nano", 1, device="nowhere")
