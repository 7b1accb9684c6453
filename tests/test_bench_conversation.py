"""`microvlm-bench conversation`: its document, its tables and its bars."""

from __future__ import annotations

import json

import pytest

from microvlm.bench import report
from microvlm.bench.bench_command import command
from microvlm.bench.conversation.conversation_bench import STAGES, bars
from microvlm.console import run_click

pytestmark = pytest.mark.linux


def test_a_conversation_is_measured_at_its_stages(speaking_bundle, tmp_path, capsys):
    report_file = tmp_path / "conversation.json"
    turns = 2 * STAGES
    with pytest.raises(SystemExit) as exit_info:
        run_click(
            command, ["conversation", str(speaking_bundle), "--turns", str(turns), "-o", str(report_file)]
        )
    document = json.loads(report_file.read_text())
    assert exit_info.value.code == (0 if all(bar["met"] for bar in document["bars"]) else 1)
    stages = document["stages"]
    assert [stage["turns"] for stage in stages] == list(range(2, turns + 1, 2))
    # Every turn shows a picture, so each is written; a probe may be, too.
    assert turns <= stages[-1]["facts"] <= turns + STAGES
    assert stages[-1]["states"] == -(-stages[-1]["facts"] // 16)
    row = 4 * (16 + 48)
    assert all(stage["written_bytes_per_turn"] > row for stage in stages)
    assert stages[-1]["fact_bytes"] - stages[0]["fact_bytes"] > (turns - 2) * row
    met = {bar["name"]: bar["met"] for bar in document["bars"]}
    assert met["growth of open descriptors"]
    assert report.text(document) in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        run_click(command, ["conversation", str(speaking_bundle), "--turns", "7"])
    assert exit_info.value.code == 2
    assert "give a multiple of 20" in capsys.readouterr().err


def test_a_bar_is_missed_by_growth_and_by_another_answer():
    def stage(**values: object) -> dict:
        probe = {"answer": "pizza", "from_memory": True}
        usual = {"rss_bytes": 100, "fact_bytes": 0, "descriptors": 5, "written_bytes_per_turn": 50}
        return {**usual, "probe": probe, **values}

    steady = [stage()] * 3
    same = {"answer": "pizza", "from_memory": True}
    assert [bar["met"] for bar in bars(steady, same)] == [True] * 4
    assert [bar["met"] for bar in bars([*steady, stage(rss_bytes=200, fact_bytes=95)], same)] == [True] * 4
    for number, (change, probe) in enumerate(
        (
            ({"rss_bytes": 111}, same),
            ({"descriptors": 6}, same),
            ({"written_bytes_per_turn": 56}, same),
            ({}, {**same, "from_memory": False}),
        )
    ):
        met = [bar["met"] for bar in bars([*steady, stage(**change)], probe)]
        assert met == [other != number for other in range(4)]
