"""Pictures of a run: curves of its metrics, attention and addressing heatmaps. Needs no display.

Figures are built without pyplot: they are freed when they are done, and no backend is chosen for the process.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from microvlm.atomic import new_file
from microvlm.errors import UserError
from microvlm.training.watching import names
from microvlm.training.watching.metrics_file import Row, read_rows, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 64
"""Tokens that are written beside a heatmap; of more, evenly many are left out."""
MOST_POINTS = 2000
"""Points of a curve that are drawn."""
_PIXELS_PER_INCH = 110
_SMOOTHED = 25
"""Logged points from which a curve is also drawn as a running mean."""


class Panel(NamedTuple):
    """Curves that share their axes."""

    title: str
    metrics: tuple[str, ...]
    unit: str
    logarithmic: bool = False


PANELS = (
    Panel(
        "Losses", (names.LOSS, names.LM_LOSS, names.DISTILLATION_KL, names.EVALUATION_LOSS), "nats per token"
    ),
    Panel(
        "Alignment of pictures and texts",
        (names.ALIGNMENT_LOSS, names.EVALUATION_ALIGNMENT_LOSS, names.ALIGNMENT_CHANCE),
        "nats",
    ),
    Panel(
        "Pictures whose text is the nearest",
        (names.EVALUATION_RECALL, names.EVALUATION_RECALL_CHANCE),
        "share",
    ),
    Panel("Plain text", (names.EVALUATION_TEXT_PERPLEXITY,), "perplexity"),
    Panel(
        "Episodes by memory",
        (names.EVALUATION_EPISODE_ON, names.EVALUATION_EPISODE_OFF, names.EVALUATION_EPISODE_EMPTY),
        "nats per token",
    ),
    Panel("KLs of the memory", (names.MEMORY_KL, names.ADDRESSING_KL), "nats per element", True),
    Panel("Learning rate", (names.LEARNING_RATE,), ""),
    Panel("Memory", (names.MEMORY_UTILIZATION,), "share of slots"),
    Panel("Entropy of attention to the prefix", (names.ATTENTION_ENTROPY,), "nats"),
    Panel(
        "Attention to the prefix",
        (
            names.ATTENTION_MEAN,
            names.ATTENTION_MAX,
            names.ATTENTION_SPARSITY,
            names.ATTENTION_DIVERGENCE,
        ),
        "share",
    ),
    Panel(
        "LeJEPA statistic (1.05: spread evenly)",
        (names.LEJEPA_IMAGE, names.LEJEPA_TEXT, names.LEJEPA_LATENTS),
        "",
        True,
    ),
    Panel("Speed", (names.SAMPLES_PER_SECOND,), "samples/s"),
)


def present(rows: list[Row]) -> list[Panel]:
    """The panels that have at least one point."""
    return [panel for panel in PANELS if any(series(rows, name)[0] for name in panel.metrics)]


def curves(metrics: Path, picture: Path) -> bool:
    """Draw the curves of a metrics.jsonl as a picture (PNG, or by its suffix). Returns False if nothing is logged yet.

    Raises UserError if a file cannot be read or written, or matplotlib is missing.
    """
    rows = read_rows(metrics)
    panels = present(rows)
    if not panels:
        return False
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(6.2 * columns, 3.1 * lines)
    for index, panel in enumerate(panels):
        draw_panel(figure.add_subplot(lines, columns, index + 1), rows, panel)
    save(figure, picture)
    return True


def panel_svg(rows: list[Row], panel: Panel) -> bytes:
    """One panel as an SVG file, with text as text."""
    from matplotlib import rc_context

    figure, content = new_figure(5.6, 2.9), io.BytesIO()
    draw_panel(figure.add_subplot(), rows, panel)
    # A fixed salt and no date: the same numbers give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "microvlm"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def draw_panel(axes: Axes, rows: list[Row], panel: Panel) -> None:
    """Draw a panel's curves over the global step; noisy ones pale, with their running mean."""
    for name in panel.metrics:
        steps, values = series(rows, name)
        if not steps:
            continue
        label = name.split("/", 1)[1] if not name.startswith("evaluation/") else name.replace("/", " ")
        if name in (names.ALIGNMENT_CHANCE, names.EVALUATION_RECALL_CHANCE):
            axes.plot(steps, values, color="grey", linestyle="--", label="chance")
        elif name.startswith("evaluation/") or len(steps) < _SMOOTHED:
            axes.plot(steps, values, marker="o", markersize=3, label=label)
        else:
            thin = slice(None, None, math.ceil(len(steps) / MOST_POINTS))
            (line,) = axes.plot(steps[thin], values[thin], alpha=0.3, linewidth=0.8)
            axes.plot(steps[thin], running_mean(values)[thin], color=line.get_color(), label=label)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if panel.logarithmic and any(value > 0 for name in panel.metrics for value in series(rows, name)[1]):
        axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Exponential mean over about a twentieth of the curve, without the bias of its start -> as long as `values`."""
    decay = 1 - 1 / max(2.0, len(values) / 20)
    total = weight = 0.0
    means = np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means[index] = total / weight
    return means


def attention_heatmap(weights: np.ndarray, tokens: Sequence[str], picture: Path) -> None:
    """Draw attention weights [T, k] of T text tokens (rows) to k prefix embeddings (columns).

    tokens : the T tokens' texts. Colours go from 0 to the largest weight, so a flat map looks flat.
    """
    weights = _matrix(weights, "attention weights [T, k]")
    if len(tokens) != len(weights):
        raise ValueError(f"{len(tokens)} tokens for {len(weights)} rows of attention")
    rows, columns = weights.shape
    figure = new_figure(2.2 + 0.2 * min(columns, 60), 1.2 + 0.2 * min(rows, MOST_LABELS))
    axes = figure.add_subplot()
    image = axes.imshow(weights, aspect="auto", cmap="inferno", vmin=0, interpolation="nearest")
    shown = range(0, rows, max(1, math.ceil(rows / MOST_LABELS)))
    labels = [_printable(tokens[row]) for row in shown]
    axes.set_yticks(list(shown), labels, fontsize=8, parse_math=False)
    axes.set_xlabel("prefix embedding", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("Attention of text tokens to the picture's embeddings", fontsize=9)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=8)
    save(figure, picture)


def addressing_heatmap(weights: np.ndarray, picture: Path) -> None:
    """Draw addressing weights [steps, K] of the memory: addressing steps (rows) x slots (columns).

    Weights may be negative (least squares): colours are centred at 0 then.
    """
    weights = _matrix(weights, "addressing weights [steps, K]")
    steps, slots = weights.shape
    figure = new_figure(2.2 + 0.06 * min(slots, 120), 1.4 + 0.12 * min(steps, 64))
    axes = figure.add_subplot()
    largest = float(np.abs(weights).max()) or 1.0
    signed = float(weights.min()) < 0
    colours, low = ("RdBu_r", -largest) if signed else ("inferno", 0.0)
    image = axes.imshow(weights, aspect="auto", cmap=colours, vmin=low, vmax=largest, interpolation="nearest")
    axes.set_xlabel("slot of the memory", fontsize=8)
    axes.set_ylabel("addressing step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title("Addressing weights", fontsize=9)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=8)
    save(figure, picture)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures of a run need matplotlib: pip install 'microvlm[train]'.") from None
    return Figure(figsize=(width, height), dpi=_PIXELS_PER_INCH, layout="constrained")


def save(figure: Figure, picture: Path) -> None:
    """Replace the file `picture` by the figure. Raises UserError if it cannot be written."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    with new_file(picture) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        figure.savefig(temporary, format=picture.suffix.lstrip(".") or "png")


def _matrix(weights: np.ndarray, what: str) -> np.ndarray:
    array = np.asarray(weights, np.float32)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{what} expected, not {list(array.shape)}")
    return array


def _printable(token: str) -> str:
    """A token on one line; matplotlib's own font lacks many scripts, whose letters it draws as boxes."""
    text = token.replace("\n", "⏎").strip(" ") or "␣"
    return text if len(text) <= 24 else f"{text[:23]}…"
