"""Plots of a document of kind `answers`: risk over coverage, and how often answers of a confidence are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microvlm.atomic import write_file
from microvlm.bench.svg_plots import Axis, Line, chart

_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def plots(document: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG, of what the document has."""
    drawings = {}
    if document.get("risk_coverage") is not None:
        drawings["risk_coverage.svg"] = risk_coverage(document)
    if document.get("calibration") is not None:
        drawings["reliability.svg"] = reliability(document)
    return drawings


def write_plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw into `folder`, which is created -> the files. Raises UserError."""
    paths = []
    for name, drawing in plots(document).items():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, drawing)
        paths.append(folder / name)
    return paths


def risk_coverage(document: dict[str, Any]) -> str:
    """The share wrong of the surest answers, with its band, over their share."""
    part = document["risk_coverage"]
    curve, area = part["curve"], part["area"]
    columns = {name: [point[name] for point in curve] for name in ("coverage", "value", "low", "high")}
    top = next(tick for tick in (0.1, 0.2, 0.5, 1.0) if max(columns["high"]) <= tick)
    ticks = [top * share for share in _SHARES]
    line = Line(
        f"95 % band; area {area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]",
        columns["coverage"],
        columns["value"],
        columns["low"],
        columns["high"],
    )
    x, y = Axis("share answered, the surest first", 0, 1, _SHARES), Axis("wrong", 0, top, ticks)
    return chart("Risk over coverage", [line], x, y, legend=(0.03, 0.9))


def reliability(document: dict[str, Any]) -> str:
    """The share right of each bin over its mean confidence."""
    part = document["calibration"]
    confidences = [each["confidence"] for each in part["bins"]]
    right = [each["right"] for each in part["bins"]]
    lines = [
        Line(f"{len(right)} bins, error {part['error']['value']:.3f}", confidences, right),
        Line("as sure as right", (0, 1), (0, 1)),
    ]
    x, y = Axis("confidence", 0, 1, _SHARES), Axis("right", 0, 1, _SHARES)
    return chart("Calibration", lines, x, y, legend=(0.55, 0.1))
