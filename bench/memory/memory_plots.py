"""Plots of the document of `memory`: recall curve, addressing heatmap, slot use, ROC of the scope detector.

Reads JSON, measures nothing, so that a saved document can be drawn again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from microvlm.atomic import write_file
from microvlm.bench.svg_plots import Axis, Line, bars, chart, heatmap

_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def plots(document: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG, of one model's document; empty for one that has costs alone."""
    if "recall" not in document:
        return {}
    return {
        "recall.svg": recall_curve(document),
        "addressing.svg": addressing(document),
        "slot_use.svg": slot_use(document),
        "scope_roc.svg": scope_roc(document),
    }


def write_plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draws into `folder`, which is created; several models get a folder each."""
    paths = []
    for part in document.get("subjects", [document]):
        destination = folder / part["label"] if "subjects" in document else folder
        for name, drawing in plots(part).items():
            destination.mkdir(parents=True, exist_ok=True)
            write_file(destination / name, drawing)
            paths.append(destination / name)
    return paths


def recall_curve(document: dict[str, Any]) -> str:
    """Recall with its band, the control and 1-nearest-neighbour of the latents, over the number of facts."""
    rows, slots = document["recall"], document["slots"]
    counts = [row["facts"] for row in rows]

    def line(name: str, key: str, band: str | None = None) -> Line:
        ends = [row[band] for row in rows] if band else []
        low, high = ([end[side] for end in ends] for side in (0, 1))
        return Line(name, counts, [row[key] for row in rows], low, high)

    lines = [
        line("recall, 95 % band", "accuracy", "ci95"),
        line("1-nearest-neighbour of the questions' latents", "nearest_neighbour"),
        line("memory reset", "control", "control_ci95"),
    ]
    # A single count gives no span to draw over.
    low, high = counts[0], max(counts[-1], counts[0] + 1)
    marks = [(slots * part, word) for part, word in ((0.5, "K/2"), (1, "K")) if low <= slots * part <= high]
    x = Axis("facts written (log scale)", low, high, counts, log=True)
    return chart(
        "Facts written once, asked for with another view", lines, x, _shares("answered right"), marks
    )


def addressing(document: dict[str, Any]) -> str:
    """|w| of every fact, steps down, slots across."""
    weights = np.abs(np.array(document["addressing"]["weights"]))
    return heatmap("Addressing: the key of each fact", weights, "slot", "step", "|w|")


def slot_use(document: dict[str, Any]) -> str:
    """Plot of the share of its prior variance that each slot lost."""
    use, count = document["addressing"]["slot_use"], len(document["addressing"]["weights"])
    title = f"Slot use after {count} facts: share of the prior variance gone"
    return bars(title, use, "slot", _shares("1 - U(k,k)"))


def scope_roc(document: dict[str, Any]) -> str:
    """Hits over false alarms, of the detector and of the residual."""
    gate = document["gate"]
    lines = [
        Line(f"{name}, area {gate[f'{key}auroc']:.3f}", *zip(*gate[f"{key}roc"], strict=True))
        for name, key in (("scope detector", ""), ("residual |z_r - z_q|", "residual_"))
    ]
    lines.append(Line("chance", (0, 1), (0, 1)))
    title = "Is the question about something written?"
    return chart(title, lines, _shares("false alarms"), _shares("hits"), legend=(0.5, 0.06))


def _shares(title: str) -> Axis:
    return Axis(title, 0.0, 1.0, _SHARES)
