"""`microvlm-train watch`: what it says of runs that go on, end, fail and were killed, and its page."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from microvlm.errors import UserError
from microvlm.training.watching import names, plots, watch_page
from microvlm.training.watching.run_reader import read_run, summary
from microvlm.training.watching.watch_command import command, document
from microvlm.training.watching.watch_page import page

NOW = 1_800_000_000.0


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_status(run: Path, state: str = "running", **changes: object) -> None:
    status = {
        "state": state,
        "stage": "stage1",
        "stage_step": 40,
        "stage_steps": 100,
        "step": 140,
        "steps": 200,
        "reason": "",
        "updated": NOW,
    }
    (run / "status.json").write_text(json.dumps(status | changes))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at step 140 of 200, a step every two seconds, with a half-written last line."""
    folder = tmp_path / "mine"
    (folder / "pictures").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / "run.json").write_text(json.dumps({"run_name": "run_3_stage1_20260131_142501"}))
    metrics = [
        {
            "step": step,
            "time": NOW - 2 * (140 - step) - (5000 if step < 100 else 0),
            names.LOSS: 3 - step / 100,
            names.ALIGNMENT_LOSS: 2.0,
            names.ALIGNMENT_CHANCE: 2.08,
            names.SAMPLES_PER_SECOND: 4.0,
        }
        for step in range(0, 141, 10)
    ]
    (folder / "metrics.jsonl").write_text(lines(*metrics) + '{"step": 150, "train/lo')
    rows = [{"stage": "stage1", "step": s, "evaluation/loss": 3.0 - s / 100} for s in (0, 50, 100)]
    (folder / "evaluations.jsonl").write_text(lines(*rows))
    plots.attention_heatmap(np.eye(3), ["a", "b", "c"], folder / "pictures/attention-00000100.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "samples/00.jpg")
    for step, answer in ((0, "nonsense"), (100, "a <b>dog</b>")):
        row = {"picture": "00.jpg", "truth": "a dog & a ball", "answer": answer, "key": "k"}
        (folder / f"samples/{step:08d}.json").write_text(json.dumps([row]))
    write_status(folder)
    return folder


def test_a_running_run_tells_its_place_its_speed_and_the_time_left(run):
    view = read_run(run, NOW)
    assert view.state == "running"
    assert view.steps_per_second == pytest.approx(0.5)
    assert view.seconds_left == pytest.approx(120)
    assert summary(view) == [
        "run_3_stage1_20260131_142501: running, stage stage1 40/100 (step 140 of 200)",
        "loss 1.6  4 samples/s  2:00 left",
        "evaluation at step 100: loss 2",
    ]


def test_the_page_holds_everything_and_nothing_from_elsewhere(run):
    html = page(read_run(run, NOW), refresh=10)
    assert '<meta http-equiv="refresh" content="10">' in html
    assert "<script" not in html
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", html)
    assert html.count("data:image/svg+xml") == 3, "losses, alignment and speed"
    assert html.count("data:image/png") == 1
    assert html.count("data:image/jpeg") == 1
    assert "a &lt;b&gt;dog&lt;/b&gt;" in html
    assert "nonsense" in html
    assert "a dog &amp; a ball" in html
    assert "2:00 left" in html
    assert "evaluation/loss" in html
    assert "http-equiv" not in page(read_run(run, NOW))


def test_a_sample_cannot_show_a_file_of_another_folder(run):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(run / "secret.jpg")
    row = {"picture": "../secret.jpg", "truth": "t", "answer": "x"}
    (run / "samples/00000100.json").write_text(json.dumps([row]))
    assert "data:image/jpeg" not in page(read_run(run, NOW))


@pytest.mark.posix
def test_a_killed_run_is_not_said_to_run(run):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    write_status(run, pid=pid, host=socket.gethostname())
    view = read_run(run, NOW)
    assert (view.state, view.reason) == ("silent", f"its process {pid} is gone")
    assert "Run the same microvlm-train command again" in page(view)
    write_status(run, pid=os.getpid(), host=socket.gethostname())
    assert read_run(run, NOW).state == "running"
    # From another machine only silence tells.
    write_status(run, pid=pid, host="elsewhere")
    assert read_run(run, NOW + 60).state == "running"
    assert read_run(run, NOW + 600).reason == "no sign of life for 10 minutes"


def test_failed_and_finished_runs_say_why_and_where_the_checkpoint_is(run):
    write_status(run, "failed", reason="the loss is no number on the samples 'a', 'b'")
    view = read_run(run, NOW + 10**6)
    assert summary(view)[0].endswith(": the loss is no number on the samples 'a', 'b'")
    write_status(run, "finished")
    (run / "checkpoint").mkdir()
    (run / "checkpoint/config.json").write_text("{}")
    view = read_run(run, NOW)
    assert view.seconds_left is None
    assert summary(view)[-1] == f"checkpoint: {run / 'checkpoint'}"


def test_half_written_and_hostile_files_are_left_out(run):
    (run / "status.json").write_text('{"state": "runn')
    (run / "run.json").write_text("[]")
    (run / "samples/00000100.json").write_text('[{"picture": 3}]')
    (run / "evaluations.jsonl").write_text(
        '{"step": true}\n{"step": 1, "time": "x"}\n{"step": 3, "evaluation/loss": "x"}\n\x00\n'
    )
    (run / "pictures/attention-00000120.png").write_bytes(b"")
    view = read_run(run, NOW)
    assert (view.state, view.name) == ("silent", "mine")
    assert list(view.samples) == [0]
    assert page(view)


def test_mutated_files_of_a_run_are_read_or_left_out(run, monkeypatch):
    monkeypatch.setattr(
        watch_page, "panel_svg", lambda rows, panel: b"<svg/>"
    )  # which takes a tenth of a second
    values = [b"null", b"true", b'"x"', b"-1", b"1e999", b"[]", b"{}", b"9" * 30, b"\xff", b"", b"NaN"]
    files = ["status.json", "run.json", "metrics.jsonl", "evaluations.jsonl", "samples/00000100.json"]
    rng = random.Random(1)
    for _ in range(200):
        path = run / rng.choice(files)
        before = content = path.read_bytes()
        for _ in range(rng.randint(1, 3)):
            places = list(re.finditer(rb'-?\d+\.?\d*|"[^"]*"|true|null', content)) or [re.match(b"", content)]
            place = rng.choice(places)
            content = content[: place.start()] + rng.choice(values) + content[place.end() :]
        path.write_bytes(content)
        view = read_run(run, NOW)
        page(view).encode()
        json.dumps([summary(view), document(view, run / "watch.html")], allow_nan=False)
        path.write_bytes(before)


def test_the_command_writes_the_page_and_prints_where(run):
    write_status(run, "finished")
    result = CliRunner().invoke(command, [str(run)])
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == f"page: {run / 'watch.html'}"
    assert (run / "watch.html").read_text().startswith("<!DOCTYPE html>")
    document = json.loads(CliRunner().invoke(command, [str(run), "--json"]).output)
    assert document["state"] == "finished"
    assert document["metrics"][names.LOSS] == pytest.approx(1.6)
    assert document["evaluation"]["evaluation/loss"] == 2.0


def test_a_followed_run_is_shown_until_it_ends(run):
    write_status(run, updated=time.time())

    def fail() -> None:
        time.sleep(0.5)
        write_status(run, "failed", reason="out of memory")

    other = threading.Thread(target=fail)
    other.start()
    result = CliRunner().invoke(command, [str(run), "--follow", "--every", "1"], standalone_mode=False)
    other.join()
    assert result.return_value == 1
    assert "running" in result.output
    assert "failed" in result.output
    assert "http-equiv" not in (run / "watch.html").read_text(), "a page of an ended run reloads itself"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run: give the folder"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        read_run(tmp_path / "nothing")
