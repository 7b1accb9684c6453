"""`microvlm-bench gate` and the store: limits that hold and that break, paths of figures, results over commits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from microvlm.bench.bench_command import command
from microvlm.bench.gates.gate_check import check_gate
from microvlm.bench.gates.metric_path import MissingMetric, look_up
from microvlm.bench.gates.result_store import add_result, read_store
from microvlm.bench.report_flags import ReportOutput
from microvlm.errors import UserError

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RUN = json.loads((RESULTS / "run-nano.json").read_text())
DECODE = "results[label=ort].phases.decode.median_ms"


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)


def gate_file(folder: Path, *limits: dict[str, Any], **others: Any) -> Path:
    (folder / "gate.json").write_text(json.dumps({"limits": limits, **others}))
    return folder / "gate.json"


@pytest.fixture
def slower_run(tmp_path: Path) -> Path:
    """run-nano's document with a decode that takes a tenth longer on ort."""
    document = copy.deepcopy(RUN)
    look_up(document, "results[label=ort].phases.decode")["median_ms"] *= 1.1
    (tmp_path / "run.json").write_text(json.dumps(document))
    return tmp_path / "run.json"


def test_the_committed_limits_hold_and_their_report_is_theirs():
    checked = check_gate(RESULTS / "limits.toml")
    assert checked == json.loads((RESULTS / "gate.json").read_text())
    assert checked["met"]


def test_a_broken_limit_is_one_line_and_status_1(tmp_path: Path, slower_run: Path):
    limits = [
        {"metric": DECODE, "max_ratio": 1.05},
        {"metric": "results[label=ort].phases.vision.median_ms", "max_ratio": 1.05, "min_ratio": 0.5},
        {"metric": "results[label=ort].status", "one_of": ["ok"]},
        {"metric": "results[label=ort].decode_tokens_per_s", "min": 1e9, "max": 2e9},
    ]
    path = gate_file(tmp_path, *limits, baseline=str(RESULTS / "run-nano.json"))
    result = bench("gate", path, slower_run)
    assert result.return_value == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"run.json: {DECODE} is not as demanded (<= 1.05 x 0.1")
    measured = next(
        entry["decode_tokens_per_s"]
        for entry in json.loads(slower_run.read_text())["results"]
        if entry["label"] == "ort"
    )
    assert f"not as demanded (>= 1e+09 and <= 2e+09): {measured:.6g}" in lines[1]
    assert "2 of 4 limits" in result.stdout
    same = gate_file(tmp_path, *limits[:3], baseline=str(RESULTS / "run-nano.json"))
    assert bench("gate", same, RESULTS / "run-nano.json").return_value == 0


@pytest.mark.parametrize(
    ("metric", "clause"),
    [
        ("results[label=abacus].status", "no entries fit the brackets"),
        ("results[status=ok].label", "2 entries fit the brackets"),
        ("ceiling.width", "there is no 'width'"),
        ("ceiling[0]", "there is no list before the brackets"),
        ("provenance.cpu", "it is no number"),
    ],
)
def test_a_figure_that_is_not_there_breaks_its_limit(metric: str, clause: str, tmp_path: Path):
    checked = check_gate(gate_file(tmp_path, {"metric": metric, "max": 1}), RESULTS / "run-nano.json")
    assert not checked["met"]
    assert checked["limits"][0]["sentence"].endswith(clause)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"limits": []}', "'limits'"),
        ('{"limits": [{"metric": "a"}]}', "a limit needs one of min, max, min_ratio, max_ratio and one_of"),
        ('{"limits": [{"metric": "a..b", "max": 1}]}', "'a..b' is no metric"),
        ('{"limits": [{"metric": "a[b]", "max": 1}]}', "'[b]' in 'a[b]' is neither a number nor KEY=VALUE"),
        ('{"limits": [{"metric": "a", "most": 1}]}', "most"),
        ('{"limits": [{"metric": "a", "max": 1}]}', "names no document"),
        ('{"limits": [{"metric": "ceiling", "max_ratio": 1, "document": "RUN"}]}', "has no baseline"),
        ("limits = 3", "is not valid JSON"),
    ],
)
def test_a_wrong_gate_file_is_one_sentence(content: str, sentence: str, tmp_path: Path):
    path = tmp_path / "gate.json"
    path.write_text(content.replace("RUN", str(RESULTS / "run-nano.json")))
    with pytest.raises(UserError) as caught:
        check_gate(path)
    assert sentence in str(caught.value)


def test_toml_that_is_none_is_one_sentence(tmp_path: Path):
    (tmp_path / "gate.toml").write_text("[[limits")
    with pytest.raises(UserError, match=r"gate.toml is not valid TOML"):
        check_gate(tmp_path / "gate.toml")


def test_paths_choose_entries_by_number_and_by_values_with_commas():
    document = {"a": [{"n": "k, 1 token", "m": 1, "v": 5}, {"n": "k, 2 tokens", "m": 1, "v": 6}]}
    assert look_up(document, "a[n=k, 2 tokens].v") == 6
    assert look_up(document, "a[m=1,n=k, 1 token].v") == 5
    assert look_up(document, "a[1].v") == 6
    with pytest.raises(MissingMetric):
        look_up(document, "a[2].v")


def test_results_are_stored_once_with_schema_and_provenance(tmp_path: Path, slower_run: Path):
    store = tmp_path / "results.jsonl"
    output = ReportOutput(as_json=True, markdown=None, json_file=None, store=store)
    output.deliver(RUN)
    output.deliver(RUN)
    add_result(store, json.loads(slower_run.read_text()))
    first, second = read_store(store)
    assert (first.schema, first.kind, first.document) == (1, "run", RUN)
    assert first.measured.provenance.commit.hash == RUN["provenance"]["commit"]["hash"]
    result = bench("history", store, "--metric", DECODE, "--metric", "none.at.all")
    head, *rows = result.stdout.splitlines()
    assert head.split()[:5] == ["measured", "commit", "kind", "model", "machine"]
    assert [row.split()[-2] for row in rows] == [
        f"{look_up(RUN, DECODE) * factor:.6g}" for factor in (1, 1.1)
    ]
    assert json.loads(bench("history", store, "--json").stdout)[1]["result_id"] == second.result_id
    assert bench("history", store, "--kind", "memory").stdout.count("\n") == 1


def test_a_gate_takes_the_newest_result_of_a_store(tmp_path: Path, slower_run: Path):
    store = tmp_path / "results.jsonl"
    add_result(store, RUN)
    add_result(store, json.loads(slower_run.read_text()))
    add_result(store, json.loads((RESULTS / "full-decoder.json").read_text()))
    limit = {"metric": DECODE, "max": 1.05 * look_up(RUN, DECODE)}
    assert not check_gate(gate_file(tmp_path, {**limit, "kind": "run"}), store)["met"]
    sentence = check_gate(gate_file(tmp_path, limit), store)["limits"][0]["sentence"]
    assert sentence.endswith("there is no 'results'")
    with pytest.raises(UserError, match="holds no result of the kind memory"):
        check_gate(gate_file(tmp_path, {**limit, "kind": "memory"}), store)


def test_a_damaged_or_newer_store_is_refused_and_left_as_it_is(tmp_path: Path):
    store = tmp_path / "results.jsonl"
    add_result(store, RUN)
    good = store.read_bytes()
    line = json.loads(good)
    line["document"]["ceiling"]["threads"] = 2
    for content, sentence in (
        (good + b"{\n", "line 2 of .* is not valid JSON"),
        (json.dumps(line).encode(), "result_id is not the hash of document"),
        (json.dumps({**line, "schema": 2}).encode(), "has schema 2; this version reads 1"),
    ):
        store.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            add_result(store, {**RUN, "more": 1})
        assert store.read_bytes() == content
        refused = bench("run", "--store", store)  # before anything is measured
        assert isinstance(refused.exception, UserError)
    with pytest.raises(UserError, match="'provenance' is missing"):
        add_result(tmp_path / "new.jsonl", {"report": "run"})
    assert not (tmp_path / "new.jsonl").exists()
