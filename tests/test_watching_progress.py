"""Progress of a run on a terminal and elsewhere, and its pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from microvlm.training.watching import names, plots
from microvlm.training.watching.progress import Progress, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_have_the_loss_the_speeds_and_the_time_left():
    lines, clock = [], Clock()
    with Progress(
        100, start=40, every=10, name="stage1", terminal=False, log=lines.append, clock=clock
    ) as progress:
        for step in range(41, 101):
            clock.now += 2.0
            progress.update(step, loss=1 / step if step % 10 == 0 else None, samples=8, tokens=4000)
    assert len(lines) == 7
    assert lines[0] == "stage1 41/100  4 samples/s  2,000 tokens/s  1:58 left"
    assert lines[1] == "stage1 50/100  loss 0.02  4 samples/s  2,000 tokens/s  1:40 left"
    assert lines[-1] == "stage1 100/100  loss 0.01  4 samples/s  2,000 tokens/s"
    assert progress.seconds_left == 0


def test_speeds_are_those_of_the_last_updates():
    clock = Clock()
    progress = Progress(1000, terminal=False, log=lambda line: None, clock=clock)
    assert progress.seconds_left is None
    for step in range(1, 201):
        clock.now += 10.0 if step <= 100 else 1.0
        progress.update(step, samples=3)
    assert progress.samples_per_second == pytest.approx(3.0)
    assert progress.seconds_left == pytest.approx(800)


@pytest.mark.posix
def test_a_terminal_gets_a_bar():
    import pty

    program = (
        "from microvlm.training.watching.progress import Progress\n"
        "with Progress(3, name='stage1') as p:\n"
        "    for step in (1, 2, 3): p.update(step, 0.5, 2, 100)\n"
        "    p.message('saved')\n"
    )
    main, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=child, env={**os.environ, "COLUMNS": "120"}
    ) as process:
        os.close(child)
        output = b""
        try:
            while chunk := os.read(main, 4096):
                output += chunk
        except OSError:  # Linux ends a pseudo-terminal with an error
            pass
    assert process.returncode == 0
    assert b"stage1: 100%" in output
    assert b"loss 0.5" in output
    assert b"tokens/s" in output
    assert b"saved" in output


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0, 42, 725.2, 12_000)] == ["0:00", "0:42", "12:05", "3:20:00"]


def test_curves_are_drawn_of_what_is_logged(tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "pictures/curves.png"
    assert plots.curves(metrics, picture) is False
    rows = [
        {"step": step, names.LOSS: 3 / step, names.ALIGNMENT_LOSS: 2.0, names.ALIGNMENT_CHANCE: 2.08}
        for step in range(1, 60)
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plots.curves(metrics, picture) is True
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 200
        assert len(drawn.convert("RGB").getcolors(1 << 24)) > 20
    assert [panel.title for panel in plots.present(rows)] == ["Losses", "Alignment of pictures and texts"]


def test_a_running_mean_has_no_bias_at_its_start():
    assert plots.running_mean([5.0] * 100) == pytest.approx(5.0)


def test_heatmaps_show_where_the_weight_is(tmp_path):
    weights = np.zeros((6, 25))
    weights[2, 7] = 0.5
    plots.attention_heatmap(weights, ["a", "$\\bad{", "猫", "\n", "", "b" * 50], tmp_path / "attention.png")
    plots.addressing_heatmap(weights - 0.01, tmp_path / "addressing.png")
    with Image.open(tmp_path / "attention.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    # The brightest end of the map is drawn, and once: in the map, and in the colour bar.
    bright = np.abs(pixels - (252, 255, 164)).sum(-1) < 12
    assert bright.any(0).sum() < pixels.shape[1] / 8
    with pytest.raises(ValueError, match="2 tokens for 6 rows"):
        plots.attention_heatmap(weights, ["a", "b"], tmp_path / "x.png")
