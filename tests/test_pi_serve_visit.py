"""The visit to `microvlm serve` that is measured on an emulated board: a real server here, and the report of it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from microvlm.bench import report
from microvlm.bench.pi.board import memory_fit, serve_visit
from microvlm.bench.pi.board.memory_fit import FittedModel
from microvlm.errors import UserError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PICTURE = ROOT / "bench" / "photographs" / "koala.jpg"
DRAWING = ROOT / "bench" / "evalset" / "images" / "2714.png"


def visit(model: str, picture: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The program as a file, as the board runs it, in a folder where a picture's name says nothing."""
    program = folder / memory_fit.VISIT
    program.write_text(Path(serve_visit.__file__).read_text())
    (folder / "picture").write_bytes(picture.read_bytes())
    arguments = [sys.executable, "-P", str(program), model, str(folder / "picture"), "--threads", "1"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = visit("nano", DRAWING, tmp_path_factory.mktemp("visit"))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.linux
def test_a_real_server_answers_health_a_caption_a_fact_and_its_recall(visited: str) -> None:
    answers = json.loads(visited.splitlines()[-1])["answers"]
    assert [each["request"] for each in answers] == ["health", "caption", "fact", "recall"]
    assert [each["source"] for each in answers] == ["server", "picture", "memory", "memory"]
    assert answers[0]["answer"] == "nano"
    assert answers[1]["answer"] == "check mark"
    # The caption was written too.
    assert answers[2]["answer"] == "2 entries"
    assert answers[3]["answer"] == serve_visit.FACT


@pytest.mark.linux
def test_memory_is_that_of_both_processes_and_adds_up(visited: str) -> None:
    run = memory_fit.served(visited)
    server, worker, together = (run["memory"][name] for name in ("server", "worker", "together"))
    for one in (server, worker):
        assert 10e6 < one["rss_bytes"] <= one["peak_rss_bytes"]
        assert max(one["anonymous_bytes"], one["file_backed_bytes"]) < one["rss_bytes"]
    # onnxruntime is in the worker, and in no other process.
    assert worker["peak_rss_bytes"] > server["peak_rss_bytes"]
    assert run["peak_rss_bytes"] == server["peak_rss_bytes"] + worker["peak_rss_bytes"]
    assert worker["peak_rss_bytes"] * 0.5 < together["pss_bytes"] < together["rss_bytes"]
    assert together["rss_bytes"] <= run["peak_rss_bytes"]


@pytest.mark.linux
def test_a_server_that_does_not_start_and_a_picture_that_is_none_end_with_status_1(tmp_path: Path) -> None:
    result = visit(str(tmp_path / "none"), DRAWING, tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Error: the server printed '' in place of its address" in result.stderr
    result = visit("nano", Path(__file__), tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Error: POST /api/ask was answered 4" in result.stderr


def test_a_fact_that_was_not_recalled_is_an_error() -> None:
    answers = [{"request": "recall", "answer": "a check mark", "source": "picture"}]
    document = {"answers": answers, "memory": {}}
    with pytest.raises(UserError, match="did not recall the fact: it answered"):
        memory_fit.served(f"a line\n{json.dumps(document)}\n")


def test_a_model_is_served_in_the_smaller_board_alone_and_the_full_size_one_in_none() -> None:
    def programs(model: FittedModel, size: int) -> list[str]:
        return [program for _, program, _ in memory_fit._tasks(model, "ort", size)]

    nano, full = FittedModel("nano", Path("nano")), memory_fit.full_size_model("full", Path("full"))
    assert programs(nano, 512) == ["caption", "chat"]
    assert programs(nano, 448) == ["caption", "chat", "serve"]
    assert programs(full, 448) == ["caption", "chat"]


def documents() -> list[dict[str, Any]]:
    return [json.loads((RESULTS / name).read_text()) for name in ("pi-fit.json", "pi-serve.json")]


def test_the_tables_of_a_visit_are_those_of_its_document_and_others_have_none() -> None:
    without, served = documents()
    assert [table.name for table in report.read_report(without).tables] == ["fit"]
    shown = report.read_report(served)
    assert [table.name for table in shown.tables] == ["fit", "serve", "answers"]
    runs = served["fit"]["runs"]
    rows = shown.tables[1].rows[1:]
    assert [row[:2] for row in rows] == [
        [run["model"], process] for run in runs for process in ("server", "worker", "together")
    ]
    assert rows[0][2] == f"{runs[0]['memory']['server']['peak_rss_bytes'] / 1e6:.1f}"
    assert rows[2][5] == f"{runs[0]['memory']['together']['pss_bytes'] / 1e6:.1f}"
    broken = copy.deepcopy(served)
    broken["fit"]["runs"][0]["memory"]["server"].pop("anonymous_bytes")
    with pytest.raises(UserError, match="anonymous_bytes"):
        report.read_report(broken)


def test_the_committed_visit_was_on_a_board_of_448_mb_without_its_oom_killer() -> None:
    _, served = documents()
    runs = {run["model"]: run for run in served["fit"]["runs"]}
    assert set(runs) == {"photo", "nano"}
    for run in runs.values():
        assert (run["program"], run["ram_bytes"], run["oom"]) == ("serve", 448 << 20, False)
        assert run["answers"][-1]["answer"] == serve_visit.FACT
        assert run["peak_rss_bytes"] < run["usable_bytes"]
