"""`microvlm-bench memory`: its document, its tables, and the statistics and views that it stands on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import tiny_config

from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.memory.costs import bars, predicted
from microvlm.bench.memory.fact_sets import NAMES, another_view, deal
from microvlm.bench.memory.memory_bench import fact_counts
from microvlm.bench.memory.memoryset_reader import load_memoryset
from microvlm.bench.stats import equal_error_rate, wilson
from microvlm.console import run_click
from microvlm.presets import preset


@pytest.fixture
def bench(capsys, speaking_bundle):
    """Flags -> (status, stdout, stderr)."""

    def call(*flags: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            run_click(command, ["memory", str(speaking_bundle), "--repeats", "1", *flags])
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return call


def test_the_document_has_every_table_and_an_untrained_model_recalls_nothing(bench, tmp_path):
    report_file = tmp_path / "memory.json"
    plots_folder = tmp_path / "plots"
    status, out, _ = bench(
        "--facts", "24", "--edits", "5", "--tune", "0", "-o", str(report_file), "--plots", str(plots_folder)
    )
    assert status == 0
    document = json.loads(report_file.read_text())
    assert document["slots"] == 16
    assert [(row["facts"], row["trials"], row["memories"]) for row in document["recall"]] == [
        (2, 12, 1),
        (4, 6, 1),
        (8, 3, 1),
        (16, 1, 1),
        (24, 1, 2),
    ]
    for row in document["recall"]:
        assert {"accuracy", "ci95", "control", "control_ci95", "nearest_neighbour"} <= row.keys()
        assert row["accuracy"] == row["control"] == 0
    edit = document["edit"]
    assert {"efficacy", "paraphrase", "neighbourhood", "neighbourhood_without_gate"} <= edit.keys()
    assert edit["facts"] == 24
    assert edit["crowded"]["facts_written"] == 8
    # After each fact alone at most four of a kind, of the same object two; beside eight facts at most a hundred.
    for table, cases in ((edit, (96, 96, 96, 48)), (edit["crowded"], (48, 48, 48, 48))):
        kinds = table["neighbours"]
        names = ("other_caption", "other_object", "like_object", "other_question")
        assert tuple(kinds[name]["cases"] for name in names) == cases
        assert table["neighbourhood"] == pytest.approx(sum(kind["kept"] for kind in kinds.values()) / 4)
        assert table["neighbourhood_without_gate"] < 1
    assert {"recall", "nearest_neighbour"} <= document["other_vendor"].keys()
    assert document["drift"]["float32_vs_float64"] < 1e-2
    assert "tuning" not in document
    values = document["open_values"]
    ways = ["same", "view", "wording", "view and wording"]
    assert [(row["facts"], row["asked"], row["trials"]) for row in values["rows"]] == [
        (8, way, 96) for way in ways
    ]
    for row in values["rows"]:
        assert row["right"] + row["wrong"] + row["not_found"] == pytest.approx(1)
        assert row["decoder"] == 0
    assert sum(row["values"] for row in values["decoder_by_length"]) == 4 * 96
    assert values["strangers"] == []
    assert {"forgotten", "retained", "attack"} <= document["forget"].keys()
    assert (document["forget"]["facts_forgotten"], document["forget"]["forgotten"]) == (4, 0)
    assert document["forget"]["retained"] is None
    assert {"edits", "retention"} <= document["sequential"].keys()
    assert document["sequential"]["drift"] < 1e-3
    assert {"encode", "read", "write", "forget", "decode_token"} <= document["latency_ms"].keys()
    assert min(document["latency_ms"].values()) > 0
    assert {"auroc", "eer"} <= document["gate"].keys()
    assert document["gate"]["kinds"].keys() == {"other_object", "other_question"}
    for part in (
        "facts with any values, their own text",
        "recall, facts written once",
        "retention after 5 edits of 8 facts",
        "in one memory",
    ):
        assert part in out
    names = ["addressing.svg", "recall.svg", "scope_roc.svg", "slot_use.svg"]
    assert sorted(path.name for path in plots_folder.iterdir()) == names


def test_costs_alone_need_no_answers(bench):
    status, out, _ = bench("--costs", "--json")
    document = json.loads(out)
    assert status == 0
    assert "recall" not in document
    assert document["costs"]["measured"]["encode_share_of_prefill"] > 0
    assert [size["name"] for size in document["costs"]["sizes"]] == ["tiny", "full"]


def test_several_backends_are_put_side_by_side(bench):
    status, out, _ = bench("--costs", "--backend", "ort,torch", "--json")
    document = json.loads(out)
    assert status == 0
    assert [entry["backend"] for entry in document["subjects"]] == ["ort", "torch"]
    assert all(entry["precision"]["decoder_bits"] == 1.58 for entry in document["subjects"])
    head, tables, _ = report.read_report(document)
    assert " on ort: 16 slots; " in head
    labels = [entry["label"] for entry in document["subjects"]]
    (times,) = [table.rows for table in tables if table.name == "latency"]
    assert times[0] == ["", *labels]
    encode = next(row for row in times if row[0] == "encode")
    assert encode[1:] == [f"{entry['latency_ms']['encode']:.3f}" for entry in document["subjects"]]


def test_mistakes_are_one_sentence(bench):
    for flags, sentence in (
        (("--facts", "3"), "--facts is 3; give 8 or more"),
        (("--tune", "-1"), "--tune is -1; give 0 or more"),
        (("--backend", "ort,none"), "unknown backend 'none'"),
    ):
        status, out, err = bench(*flags)
        assert (status, out) == (2, "")
        assert sentence in err


def test_only_a_full_size_is_held_to_the_bars():
    shares = {"read_write_share_of_answer": 0.02, "encode_share_of_prefill": 0.08}
    assert [bar["met"] for bar in bars(preset("full"), shares)] == [False, True]
    assert [bar["met"] for bar in bars(tiny_config(), shares)] == [None, None]


def test_the_full_size_is_predicted_to_cost_what_the_design_allows():
    size = predicted(preset("full"))
    assert size["predicted_read_write_share_of_answer"] < 0.01
    assert size["predicted_encode_share_of_prefill"] < 0.1
    tiny = predicted(tiny_config())
    # One layer of the tiny decoder: q and o 64 x 64, k and v 64 x 32, three of 64 x 96.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    assert tiny["predicted_encode_macs"] == 2 * (20 * layer + 2 * 20 * 20 * 64) + 48 * (64 + 16)


def test_facts_are_dealt_again_alike_and_their_two_views_differ():
    objects = load_memoryset()
    facts, again = deal(objects, 6), deal(objects, 6)
    for fact, same_fact in zip(facts, again, strict=True):
        assert (fact.object, fact.name) == (same_fact.object, same_fact.name)
        assert np.array_equal(fact.query_view, same_fact.query_view)
        assert fact.written_view.shape == (96, 96, 3)
        assert not np.array_equal(fact.written_view, fact.query_view)
        assert fact.name in NAMES
    assert len(set(NAMES)) == 50
    count = len(objects.objects)
    more = deal(objects, 3 * count)
    assert len(more) == 2 * count
    assert len({fact.object for fact in more[:count]}) == count
    assert more[0].object == more[count].object
    assert more[0].question != more[count].question


def test_a_view_keeps_the_object_and_changes_its_ground():
    picture = np.full((96, 96, 3), 255, np.uint8)
    picture[30:66, 30:66] = (200, 10, 10)
    views = [another_view(picture, picture, np.random.default_rng(seed)) for seed in range(12)]
    red = [(np.abs(view.astype(int) - (200, 10, 10)).sum(-1) < 30).sum() for view in views]
    assert min(red) > 300
    assert len({tuple(view[48, 0]) for view in views}) > 1
    assert len(set(red)) > 3


def test_fact_counts_double_to_four_times_the_slots():
    assert fact_counts(64, 256) == [8, 16, 32, 64, 128, 256]
    assert fact_counts(64, 210) == [8, 16, 32, 64, 128, 210]
    assert fact_counts(16, 8) == [2, 4, 8]


def test_wilsons_interval_of_known_cases():
    # Agresti & Coull 1998: 0 of 10 and 5 of 10.
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_area_and_equal_error_rate_of_known_scores():
    high, low = np.array([0.9, 0.8, 0.7]), np.array([0.1, 0.2, 0.3])
    assert equal_error_rate(high, low) == (1.0, 0.0)
    assert equal_error_rate(low, high)[0] == 0.0
    same = np.array([0.5, 0.5])
    assert equal_error_rate(same, same)[0] == 0.5
    auroc, eer = equal_error_rate(np.array([1.0, 0.6, 0.4, 0.9]), np.array([0.5, 0.1, 0.2, 0.3]))
    assert (auroc, eer) == (15 / 16, 0.25)
