"""`microvlm-bench compare`: verdicts on seeded and recorded samples, energy, saved documents, processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from microvlm.backends import native
from microvlm.backends.native.kernel_calls import bind_multiply, multiply
from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.comparison.comparison_bench import judge_all
from microvlm.bench.comparison.energy import EnergyCounter
from microvlm.bench.comparison.judgement import (
    FASTER,
    SAME,
    SLOWER,
    UNDECIDED,
    Judgement,
    judge,
    outliers,
    sign_test,
    summary,
    unpaired_ratio,
)
from microvlm.bench.comparison.kernel_timer import KernelTimer, products_of
from microvlm.bench.comparison.saved_runs import compare_saved
from microvlm.bench.comparison.turns import KERNEL_SAMPLES, Samples
from microvlm.bench.stats import Interval
from microvlm.errors import UserError
from microvlm.formats.op_table import MATMUL_BY_KIND

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"


def drawn_samples(slowdown: float, seed: int, pairs: int = 10, rounds: int = 16) -> np.ndarray:
    """Milliseconds as this machine makes them: 2 % from process to process, 5 % from round to round, rare delays."""
    random = np.random.default_rng(seed)
    place = random.normal(0, 0.02, (pairs, 1, 2))
    noise = random.normal(0, 0.05, (pairs, rounds, 2))
    delays = np.where(random.random((pairs, rounds, 2)) < 0.05, 5.0, 1.0)
    drift = np.linspace(1, 1.5, pairs * rounds).reshape(pairs, rounds, 1)
    return np.exp(place + noise) * delays * drift * np.array([1.0, 1 + slowdown])


def test_a_slowdown_of_a_tenth_is_found_and_no_change_is_not():
    slowed = [judge("decode", drawn_samples(0.1, seed), 11).verdict for seed in range(20)]
    unchanged = [judge("decode", drawn_samples(0.0, seed), 11).verdict for seed in range(100, 120)]
    assert slowed.count(SLOWER) >= 19
    assert SLOWER not in unchanged
    assert FASTER not in unchanged


def test_rounds_in_one_process_do_not_stand_for_processes():
    """Two processes whose memory lies differently: a thousand rounds in them do not make a difference real."""
    random = np.random.default_rng(3)
    pairs = np.exp(np.array([0.08, -0.02, 0.06, -0.03, 0.07, 0.05])[:, None, None] * np.array([0.0, 1.0]))
    samples = pairs * np.exp(random.normal(0, 0.01, (6, 1000, 2)))
    assert judge("vision", samples, 1).verdict == UNDECIDED


def test_pairs_that_differ_wildly_are_rarely_taken_for_a_difference():
    """Times of loading on a busy machine: one sample a process, and a process in five takes twice as long."""
    random = np.random.default_rng(7)
    noise = np.exp(random.normal(0, 0.1, (400, 10, 1, 2)) + 0.7 * (random.random((400, 10, 1, 2)) < 0.2))
    verdicts = [judge("load", samples, 11).verdict for samples in noise]
    assert sum(verdict in (SLOWER, FASTER) for verdict in verdicts) <= 4


def test_the_sign_test_is_exact():
    assert sign_test(np.full(10, 0.1)) == 2 / 1024
    assert sign_test(np.array([0.1] * 9 + [-0.1])) == 22 / 1024
    assert sign_test(np.array([0.1, -0.1])) == 1


def test_a_difference_below_the_margin_does_not_count():
    samples = np.exp(np.random.default_rng(1).normal(0, 1e-3, (10, 16, 2))) * np.array([1.0, 1.01])
    judgement = judge("decode", samples, 7)
    assert judgement.verdict == SAME
    assert "no difference that counts, +1.0 %" in judgement.sentence


def test_outliers_are_counted_and_left_in():
    samples = np.full((5, 4, 2), 1.0) + np.random.default_rng(2).normal(0, 0.01, (5, 4, 2))
    samples[2, 1, 0] = 40.0
    found = outliers(samples[..., 0])
    assert (found.count, found.samples, found.largest_ms) == (1, 20, 40.0)


def test_the_sentence_of_a_comparison_names_what_is_slower():
    def judged(name: str, verdict: str) -> Judgement:
        return Judgement(name, Interval(1.1, 1.05, 1.2), verdict)

    assert summary([judged("decode", SLOWER), judged("load", SAME)]) == (
        SLOWER,
        "B is slower than A in decode",
    )
    assert summary([judged("decode", SLOWER), judged("load", FASTER)])[0] == "mixed"
    assert summary([judged("decode", SAME), judged("load", UNDECIDED)]) == (
        SAME,
        "no real difference was found; undecided: load",
    )
    assert summary([judged("decode", UNDECIDED)])[0] == UNDECIDED


def test_the_committed_comparison_follows_from_its_samples():
    document = json.loads((RESULTS / "compare-slowed.json").read_text())
    samples = {name: np.asarray(values) for name, values in document["samples_ms"].items()}
    judged = {judgement.name: judgement.verdict for judgement in judge_all(Samples(samples))}
    assert judged == {entry["name"]: entry["verdict"] for entry in document["quantities"]}
    assert judged["kernel ternary2x4, 1 token"] == SLOWER


def test_the_committed_trials_meet_the_bar():
    document = json.loads((RESULTS / "compare-bar.json").read_text())
    assert document["slowdown"] == 0.1
    for slowed in (True, False):
        trials = [trial for trial in document["trials"] if trial["slowed"] == slowed]
        assert len(trials) == len(document["trials"]) / 2 > 0
        assert sum(not trial["right"] for trial in trials) <= document["most_wrong"] == 1
    # One in twenty of all, slowed and not, however many of each were made.
    assert len(document["trials"]) >= 20 * max(1, sum(not trial["right"] for trial in document["trials"]))


def test_energy_counters_of_all_packages_are_added_and_wrap(tmp_path: Path):
    def write(zone: str, microjoules: int) -> None:
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000\n")

    assert EnergyCounter.find(tmp_path) is None
    write("intel-rapl:0", 1_000_000)
    write("intel-rapl:1", 9_500_000)
    write("intel-rapl:0:0", 5)  # a part of package 0, which holds it already
    counter = EnergyCounter.find(tmp_path)
    assert counter is not None
    write("intel-rapl:0", 3_000_000)
    write("intel-rapl:1", 500_000)
    write("intel-rapl:0:0", 5_000_000)
    assert counter.joules() == pytest.approx(2.0 + 1.0)
    assert counter.joules() == 0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert EnergyCounter.find(tmp_path) is None


def test_a_bound_product_is_the_product(native_library: Path):
    random = np.random.default_rng(0)
    op = MATMUL_BY_KIND["ternary2x4"]
    trits = random.integers(-1, 2, (12, 20)).astype(np.int8)
    (packed,) = op.pack(trits)
    x, scale = random.standard_normal((3, 20), np.float32), np.float32([0.5])
    out = np.full((3, 12), np.nan, np.float32)
    again = bind_multiply(native.active_variant(), op.name, x, packed, scale, 12, None, out)
    again()
    assert (out == op.reference(x, packed, scale, rows=12)).all()
    x *= 2
    again()
    assert (out == multiply(native.active_variant(), op.name, x, packed, scale, 12)).all()


def test_every_product_of_a_bundle_is_timed(native_library: Path, speaking_bundle: Path):
    timer = KernelTimer(speaking_bundle)
    assert timer.names == [product.name for product in products_of(speaking_bundle)]
    assert "kernel ternary2x4, 1 token" in timer.names
    assert all(timer.run(name) > 0 for name in timer.names)


def compare(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(command, ["compare", *map(str, arguments), "--json"], standalone_mode=False)
    assert result.exception is None, result.output
    return json.loads(result.stdout)


def test_two_sides_are_run_in_turns_in_fresh_processes(native_library: Path, speaking_bundle: Path):
    few = ("--pairs", 4, "--rounds", 2, "--new-tokens", 4)
    document = compare(
        speaking_bundle, speaking_bundle, *few, "--library-b", native_library, "--python-b", sys.executable
    )
    assert document["b"] | {"path": ""} == {
        "model": speaking_bundle.name,
        "backend": "ort",
        "library": native_library.name,
        "other_python": True,
        "path": "",
    }
    assert document["a"]["path"] == document["b"]["path"]
    shapes = {name: np.asarray(values).shape for name, values in document["samples_ms"].items()}
    assert shapes["load"] == (4, 1, 2)
    assert shapes["decode"] == shapes["end_to_end"] == (4, 2, 2)
    assert shapes["kernel ternary2x4, 32 tokens"] == (4, 2 * KERNEL_SAMPLES, 2)
    entries = {entry["name"]: entry for entry in document["quantities"]}
    assert entries["decode"]["shares_of_ceiling"][0] > 0
    assert entries["load"]["shares_of_ceiling"] == [None, None]
    assert "B against A" in report.text(document)


def test_a_side_that_cannot_run_is_one_sentence(speaking_bundle: Path, tmp_path: Path):
    damaged = tmp_path / "libmicrovlm_ops.so"
    damaged.write_bytes(b"\x7fELF no more")
    runner = CliRunner()
    for extra, sentence in (
        (["--library-b", str(damaged)], "side B cannot be measured: the native library"),
        (["--library-a", str(tmp_path / "none.so")], "--library-a"),
        (["--python-b", str(damaged)], "--python-b"),
        (["--backend-b", "abacus"], "there is no backend 'abacus'"),
        (["--margin", "-1"], "--margin is -1; give percent"),
    ):
        arguments = ["compare", str(speaking_bundle), str(speaking_bundle), "--pairs", "4", *extra]
        result = runner.invoke(command, arguments, standalone_mode=False)
        assert isinstance(result.exception, UserError), extra
        assert sentence in str(result.exception)


def saved_run(path: Path, seed: int, factor: float, **changes: Any) -> Path:
    """A document of `run` with samples, of one backend."""
    document = json.loads((RESULTS / "run-nano.json").read_text())
    random = np.random.default_rng(seed)
    (entry,) = [entry for entry in document["results"] if entry["label"] == "ort"]
    for times in entry["phases"].values():
        drawn = times["median_ms"] * factor * np.exp(random.normal(0, 0.02, 30))
        times.update(samples_ms=list(drawn), median_ms=float(np.median(drawn)))
    document["provenance"] |= changes
    document["results"] = [entry]
    path.write_text(json.dumps(document))
    return path


def test_two_saved_runs_are_compared_with_a_warning(tmp_path: Path):
    first = saved_run(tmp_path / "a.json", 1, 1.0)
    slower = compare(first, saved_run(tmp_path / "b.json", 2, 1.2, cpu="another"))
    assert slower["verdict"] == SLOWER
    assert not slower["in_turns"]
    assert any("were not measured in turns" in remark for remark in slower["remarks"])
    assert any("other machines" in remark for remark in slower["remarks"])
    same = compare(first, saved_run(tmp_path / "c.json", 3, 1.01))
    assert same["verdict"] == SAME
    assert "ort: decode" in report.text(same)


def test_saved_runs_without_samples_or_of_another_kind_are_refused(tmp_path: Path):
    first = saved_run(tmp_path / "a.json", 1, 1.0)
    older = json.loads(first.read_text())
    for times in older["results"][0]["phases"].values():
        del times["samples_ms"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match="holds no samples, as those of older versions"):
        compare_saved(first, tmp_path / "older.json")
    with pytest.raises(UserError, match="is a 'kernels' report"):
        compare_saved(first, RESULTS / "kernels-layer.json")
    other = json.loads(first.read_text())
    other["results"][0]["label"] = "abacus"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="no backend of the same name"):
        compare_saved(first, tmp_path / "other.json")


def test_unpaired_samples_have_wider_intervals_the_fewer_there_are():
    random = np.random.default_rng(0)
    values = np.exp(random.normal(0, 0.1, (2, 200)))
    few, many = (unpaired_ratio(values[0, :count], values[1, :count], 0.99) for count in (10, 200))
    assert few.high - few.low > 2 * (many.high - many.low)
