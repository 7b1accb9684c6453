"""The numbers of a run: metrics.jsonl, the trackers of Accelerate, and names of runs."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from microvlm.errors import UserError
from microvlm.training.watching import names, tracking
from microvlm.training.watching.metrics_file import cut, read_rows, series
from microvlm.training.watching.run_name import next_run_name
from microvlm.training.watching.tracking import Tracking, accelerator_options, check_trackers


def tracked(run: Path, *trackers: str) -> tuple[Accelerator, Tracking]:
    accelerator = Accelerator(**accelerator_options(trackers, run))
    return accelerator, Tracking(
        accelerator, run, "run_1_test_20260101_000000", {"seed": 7, "data": {"n": 3}}
    )


def test_every_name_has_a_meaning():
    constants = {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
    assert constants == set(names.MEANINGS)


def test_metrics_are_lines_of_json_also_without_a_tracker(tmp_path):
    _, tracked_run = tracked(tmp_path / "run", "none")
    tracked_run.log(1, {names.LOSS: torch.tensor(2.5), names.LM_LOSS: 2})
    tracked_run.log(2, {names.LOSS: float("nan"), names.LM_LOSS: float("-inf")})
    tracked_run.close()
    first, second = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert first["step"] == first[names.GLOBAL_STEP] == 1
    assert (first[names.LOSS], first[names.LM_LOSS]) == (2.5, 2)
    assert second[names.LOSS] is second[names.LM_LOSS] is None
    assert second["not_finite"] == {names.LOSS: "nan", names.LM_LOSS: "-inf"}


def test_half_written_lines_are_left_out_and_a_resumed_run_cuts_what_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 3}\n{"step": 2, "train/loss": null}\n[1]\n{"step": 3, "tr')
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert series(rows, names.LOSS) == ([1], [3.0])
    cut(path, 1)
    assert path.read_text() == '{"step": 1, "train/loss": 3}\n'
    assert read_rows(tmp_path / "none.jsonl") == []


def test_tensorboard_holds_the_values_the_pictures_and_the_steps_after_a_rewind(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = tmp_path / "map.png"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(picture)
    _, run = tracked(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        run.log(step, {names.LOSS: 1 / step, names.LM_LOSS: float("inf")})
    run.picture(2, names.ADDRESSING_HEATMAP, picture)
    run.rewind(2)
    run.log(3, {names.LOSS: 9.0})
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / tracking.PROJECT)).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars(names.LOSS)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert [(e.step, e.width, e.height) for e in events.Images(names.ADDRESSING_HEATMAP)] == [(2, 6, 4)]
    assert names.LM_LOSS not in events.Tags()["scalars"]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_wandb_offline_writes_a_run_that_its_own_reader_reads(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    picture = tmp_path / "map.png"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(picture)
    _, run = tracked(tmp_path, "wandb")
    run.log(1, {names.LOSS: 0.25})
    run.picture(1, names.ADDRESSING_HEATMAP, picture)
    run.rewind(0)
    run.log(1, {names.LOSS: 0.5})
    run.close()
    # W&B's service writes the file's end after the run has finished.
    for _ in range(100):
        if len(values := wandb_values(tmp_path, names.LOSS)) == 2:
            break
        time.sleep(0.1)
    assert values == [(1, 0.25), (1, 0.5)]
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/memory/*.png"))


def wandb_values(folder: Path, name: str) -> list[tuple[int, float]]:
    """(global step, value) of a metric in the offline file of W&B, in its order.

    The file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB hold pieces, each after its checksum (4
    bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last).
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, pieces, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pieces, at = pieces + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record, pieces = wandb_internal_pb2.Record.FromString(pieces), b""
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            found += [(items[names.GLOBAL_STEP], items[name])] if name in items else []
    return found


def test_trackio_keeps_the_values_in_its_local_store(tmp_path):
    if tracking.importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    program = f"""
import json, sys
from pathlib import Path
from accelerate import Accelerator
from microvlm.training.watching.tracking import Tracking, accelerator_options
accelerator = Accelerator(**accelerator_options(["trackio"], Path({str(tmp_path)!r})))
run = Tracking(accelerator, Path({str(tmp_path)!r}), "run_1_test", {{"seed": 7}})
run.log(1, {{"train/loss": 0.5}})
run.log(2, {{"train/loss": 0.25}})
run.close()
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("microvlm", "run_1_test")
print(json.dumps([(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1, 0.5], [2, 0.25]], "trackio printed on stdout, or lost a value"


def test_a_tracker_that_fails_is_switched_off_in_one_sentence_and_the_run_goes_on(tmp_path, capsys):
    accelerator, run = tracked(tmp_path, "tensorboard")
    run.log(1, {names.LOSS: 3.0})
    accelerator.trackers[0].tracker.close()
    # A file where TensorBoard keeps its folder: it cannot open its next event file, as on a broken disk.
    folder = tmp_path / "tensorboard" / tracking.PROJECT
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("")
    capsys.readouterr()
    run.log(2, {names.LOSS: 2.0})
    run.log(3, {names.LOSS: 1.0})
    run.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("the tracker tensorboard is off from here on: ")
    assert series(read_rows(tmp_path / "metrics.jsonl"), names.LOSS) == ([1, 2, 3], [3.0, 2.0, 1.0])


@pytest.mark.posix
def test_metrics_that_cannot_be_saved_are_one_sentence(tmp_path, capsys):
    _, run = tracked(tmp_path, "none")
    (tmp_path / "metrics.jsonl").mkdir()
    run.log(1, {names.LOSS: 3.0})
    run.log(2, {names.LOSS: 2.0})
    (tmp_path / "metrics.jsonl").rmdir()
    run.log(3, {names.LOSS: 1.0})
    run.close()
    assert capsys.readouterr().err.count("metrics are not being saved: ") == 1
    assert series(read_rows(tmp_path / "metrics.jsonl"), names.LOSS) == ([3], [1.0])


def test_trackers_that_cannot_be_had_are_refused_with_what_to_do(monkeypatch):
    check_trackers(["tensorboard"])
    check_trackers(["none"])
    with pytest.raises(UserError, match="unknown tracker 'mlflow': use tensorboard, wandb, trackio, or none"):
        check_trackers(["mlflow"])
    with pytest.raises(UserError, match="turns all trackers off"):
        check_trackers(["none", "tensorboard"])
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_a_tracker_that_cannot_start_is_refused(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"a tracker \(tensorboard\) cannot start: .*--track none"):
        tracked(tmp_path, "tensorboard")


def test_run_names_count_up_over_the_runs_of_a_folder(tmp_path):
    now = datetime(2026, 1, 31, 14, 25, 1)
    assert next_run_name(tmp_path / "runs", "stage1", now) == "run_1_stage1_20260131_142501"
    for name in ("run_2_a_20260101_000000", "run_11_b_20260101_000000", "mine", "run_x_"):
        (tmp_path / name).mkdir()
    assert next_run_name(tmp_path, "a/../b c", now) == "run_12_a-..-b-c_20260131_142501"
