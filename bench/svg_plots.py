"""Line charts, bars, points and heatmaps as SVG text. Knows no measurement. Pillow compresses a heatmap's pixels.

A chart is a white card, so that it reads on a dark page too; every number on it has two or three digits.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from microvlm.escaping import printable

WIDTH, HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 44, 56
COLOURS = ("#0b6e8f", "#c2541b", "#5b7f2b", "#7b4fa3", "#666666")
"""Line colours that people who see no red or no green can tell apart; dashes and markers differ too."""
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")
# Dark to bright, so that the map reads in grey too: (position, red, green, blue).
_MAP = np.array(
    [(0.0, 0, 0, 4), (0.25, 87, 16, 110), (0.5, 188, 55, 84), (0.75, 249, 142, 9), (1.0, 252, 255, 164)]
)


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high` are the ends of its band, as long as `y`, or empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """An axis of a chart, from `low` to `high`."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Position of `value` on the axis, 0..1."""
        scale: Callable[[float], float] = np.log if self.log else float
        return float((scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low)))


def chart(
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    marks: Sequence[tuple[float, str]] = (),
    legend: tuple[float, float] = (0.03, 0.4),
) -> str:
    """Curves with their bands; `marks` are upright lines with a word each; `legend` is where its last line starts, as
    shares of the sides from the lower left.
    """
    body = [_frame(title, x, y)]
    for value, word in marks:
        at = _x(x, value)
        body.append(
            f'<line x1="{at}" y1="{_TOP}" x2="{at}" y2="{HEIGHT - _BOTTOM}" stroke="#999" stroke-dasharray="3 3"/>'
        )
        body.append(_text(at, _TOP - 5, word, size=11, colour="#666"))
    for index, line in enumerate(lines):
        body.append(_curve(line, x, y, index))
        left = _LEFT + legend[0] * (WIDTH - _LEFT - _RIGHT)
        top = HEIGHT - _BOTTOM - legend[1] * (HEIGHT - _TOP - _BOTTOM) - 16 * (len(lines) - 1 - index)
        body.append(
            f'<line x1="{left:.1f}" y1="{top - 4:.1f}" x2="{left + 28:.1f}" y2="{top - 4:.1f}" '
            f'stroke="{_colour(index)}" stroke-width="2" stroke-dasharray="{_DASHES[index % len(_DASHES)]}"/>'
        )
        body.append(_text(round(left + 34, 1), round(top, 1), line.name, anchor="start"))
    return _document(title, body)


def bars(title: str, values: Sequence[float], x_title: str, y: Axis) -> str:
    """One bar a value, as wide as they fit."""
    count = len(values)
    ticks = sorted({0, count - 1, *range(0, count, max(1, round(count / 8 / 4) * 4))})
    x = Axis(
        x_title,
        -0.5,
        count - 0.5,
        [tick for tick in ticks if tick == count - 1 or count - 1 - tick > count / 16],
    )
    width = (WIDTH - _LEFT - _RIGHT) / count
    body = [_frame(title, x, y)]
    for index, value in enumerate(values):
        top, bottom = _y(y, value), _y(y, y.low)
        body.append(
            f'<rect x="{_LEFT + index * width:.2f}" y="{top}" width="{max(width * 0.85, 0.5):.2f}" '
            f'height="{max(bottom - top, 0):.2f}" fill="{COLOURS[0]}"/>'
        )
    return _document(title, body)


def heatmap(title: str, values: np.ndarray, x_title: str, y_title: str, key: str) -> str:
    """values [rows, columns] from their smallest (dark) to their largest (bright); row 0 is at the top."""
    rows, columns = values.shape
    low, high = float(values.min()), float(values.max())
    shares = (values - low) / max(high - low, 1e-12)
    y = Axis(y_title, rows - 0.5, -0.5, _round_ticks(rows))
    x = Axis(x_title, -0.5, columns - 0.5, _round_ticks(columns))
    body = [
        _frame(title, x, y, grid=False),
        _pixels(shares, _LEFT, _TOP, WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM),
    ]
    left = WIDTH - _RIGHT - 190
    body.append(_text(left - 6, 34, f"{key}: {low:.2g}", anchor="end", size=11))
    body.append(_pixels(np.linspace(0, 1, 64)[None], left, 25, 140, 10))
    body.append(_text(left + 146, 34, f"{high:.2g}", anchor="start", size=11))
    return _document(title, body)


def _curve(line: Line, x: Axis, y: Axis, index: int) -> str:
    points = [(_x(x, a), _y(y, b)) for a, b in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{a},{b}" for a, b in points)
    parts = []
    if line.low:
        upper = [f"{_x(x, a)},{_y(y, b)}" for a, b in zip(line.x, line.high, strict=True)]
        lower = [f"{_x(x, a)},{_y(y, b)}" for a, b in zip(line.x, line.low, strict=True)]
        parts.append(
            f'<polygon points="{" ".join([*upper, *lower[::-1]])}" fill="{_colour(index)}" opacity="0.16"/>'
        )
    dash = _DASHES[index % len(_DASHES)]
    parts.append(
        f'<polyline points="{path}" fill="none" stroke="{_colour(index)}" stroke-width="2" stroke-dasharray="{dash}"/>'
    )
    if len(points) <= 16:
        parts += [f'<circle cx="{a}" cy="{b}" r="3" fill="{_colour(index)}"/>' for a, b in points]
    return "".join(parts)


def _frame(title: str, x: Axis, y: Axis, grid: bool = True) -> str:
    parts = [_text(_LEFT, 24, title, anchor="start", size=15)]
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for tick in y.ticks:
        at = _y(y, tick)
        if grid:
            parts.append(f'<line x1="{_LEFT}" y1="{at}" x2="{right}" y2="{at}" stroke="#e4e4e4"/>')
        parts.append(_text(_LEFT - 8, at + 4, f"{tick:g}", anchor="end"))
    for tick in x.ticks:
        at = _x(x, tick)
        parts.append(f'<line x1="{at}" y1="{bottom}" x2="{at}" y2="{bottom + 5}" stroke="#888"/>')
        parts.append(_text(at, bottom + 19, f"{tick:g}"))
    parts.append(f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" fill="none" stroke="#888"/>')
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 14, x.title))
    middle = (_TOP + bottom) / 2
    parts.append(f'<g transform="rotate(-90 18 {middle})">{_text(18, middle, y.title)}</g>')
    return "".join(parts)


def _pixels(shares: np.ndarray, left: float, top: float, width: float, height: float) -> str:
    """shares [rows, columns] in 0..1, a pixel each, stretched without smoothing."""
    colours = np.stack([np.interp(shares, _MAP[:, 0], _MAP[:, c]) for c in (1, 2, 3)], -1)
    packed = io.BytesIO()
    Image.fromarray(colours.round().astype(np.uint8)).save(packed, "PNG", optimize=True)
    data = base64.b64encode(packed.getvalue()).decode()
    return (
        f'<image x="{left}" y="{top}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" image-rendering="optimizeSpeed" href="data:image/png;base64,{data}"/>'
    )


def _round_ticks(count: int) -> list[float]:
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if count / step <= 9)
    return [float(tick) for tick in range(0, count, step)]


def _x(axis: Axis, value: float) -> float:
    return round(_LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT), 2)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM), 2)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _text(
    x: float, y: float, words: str, anchor: str = "middle", size: int = 12, colour: str = "#222"
) -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{escape(printable(words))}</text>"


def _document(title: str, body: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" role="img"><title>{escape(printable(title))}</title>'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>{"".join(body)}</svg>\n'
    )


@dataclass(frozen=True)
class Points:
    """A group of points; `labels` are written beside them, or empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()


def scatter(
    title: str,
    groups: Sequence[Points],
    x: Axis,
    y: Axis,
    lines: Sequence[Line] = (),
    legend: tuple[float, float] = (0.03, 0.95),
) -> str:
    """Points, a shape and a colour a group, with curves behind them; `legend` is where its first line stands."""
    body = [_frame(title, x, y)]
    body += [_curve(line, x, y, len(COLOURS) - 1) for line in lines]
    for index, group in enumerate(groups):
        for place, (a, b) in enumerate(zip(group.x, group.y, strict=True)):
            at = _x(x, a), _y(y, b)
            body.append(_marker(*at, index))
            if group.labels:
                label, ends = group.labels[place][:40], at[0] > WIDTH / 2
                aside = (round(at[0] - 8, 1), "end") if ends else (round(at[0] + 8, 1), "start")
                body.append(_text(aside[0], at[1] - 6, label, anchor=aside[1], size=11))
        left = _LEFT + legend[0] * (WIDTH - _LEFT - _RIGHT) + 6
        top = round(HEIGHT - _BOTTOM - legend[1] * (HEIGHT - _TOP - _BOTTOM) + 15 * index, 1)
        body.append(_marker(round(left, 1), top - 4, index))
        body.append(_text(round(left + 12, 1), top, group.name, anchor="start", size=11))
    for index, line in enumerate(lines):
        left = _LEFT + legend[0] * (WIDTH - _LEFT - _RIGHT)
        top = round(HEIGHT - _BOTTOM - legend[1] * (HEIGHT - _TOP - _BOTTOM) + 15 * (len(groups) + index), 1)
        body.append(f'<line x1="{left}" y1="{top - 4}" x2="{left + 12}" y2="{top - 4}" stroke="#666"/>')
        body.append(_text(round(left + 18, 1), top, line.name, anchor="start", size=11))
    return _document(title, body)


def stacked(title: str, rows: dict[str, dict[str, float]], x_title: str) -> str:
    """A bar a row, from left to right its parts, named in a legend; each part has a hatching of its own and its number
    where that fits."""
    parts = list(dict.fromkeys(name for row in rows.values() for name in row))
    totals = [sum(row.values()) for row in rows.values()]
    top = max(totals, default=0) or 1
    left, bar = 120, min(46, (HEIGHT - 150) // max(len(rows), 1))
    width = WIDTH - left - _RIGHT - 60
    body = [_text(20, 24, title, anchor="start", size=15), _hatchings(title, len(parts))]
    for number, (label, row) in enumerate(rows.items()):
        at, y = float(left), 50 + number * (bar + 10)
        body.append(_text(left - 8, y + bar / 2 + 4, label[:18], anchor="end"))
        for name, value in row.items():
            index = parts.index(name)
            long, said = value / top * width, f"{label}, {name}: {value:.4g}"
            body.append(
                f'<rect x="{at:.2f}" y="{y}" width="{long:.2f}" height="{bar}" stroke="white" '
                f'fill="url(#{_hatching_id(title, index)})"><title>{escape(printable(said))}</title></rect>'
            )
            at += long
        body.append(_text(round(at + 6, 1), y + bar / 2 + 4, f"{sum(row.values()):.4g}", anchor="start"))
    under = 50 + len(rows) * (bar + 10) + 10
    for index, name in enumerate(parts):
        across, down = 20 + (index % 3) * 205, under + (index // 3) * 20
        body.append(
            f'<rect x="{across}" y="{down}" width="14" height="12" fill="url(#{_hatching_id(title, index)})"/>'
        )
        body.append(_text(across + 20, down + 10, name, anchor="start", size=11))
    height = under + 20 * -(-len(parts) // 3) + 40
    body.append(_text(WIDTH / 2, height - 16, x_title))
    return _document(title, body, height)


def _marker(x: float, y: float, index: int) -> str:
    """A circle, square, triangle, diamond or cross, in this order."""
    colour = _colour(index)
    shapes = (
        f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>',
        f'<rect x="{x - 4}" y="{y - 4}" width="8" height="8" fill="{colour}"/>',
        f'<path d="M{x - 5},{y + 4}L{x + 5},{y + 4}L{x},{y - 5}Z" fill="{colour}"/>',
        f'<path d="M{x - 5},{y}L{x},{y - 5}L{x + 5},{y}L{x},{y + 5}Z" fill="{colour}"/>',
        f'<path d="M{x - 4},{y - 4}L{x + 4},{y + 4}M{x - 4},{y + 4}L{x + 4},{y - 4}" stroke="{colour}" '
        'stroke-width="2"/>',
    )
    return shapes[index % len(shapes)]


def _hatching_id(title: str, index: int) -> str:
    """Unique in a page that holds several charts."""
    return f"h{zlib.crc32(title.encode()):08x}-{index}"


def _hatchings(title: str, count: int) -> str:
    """One fill a part: a colour, and white lines of another direction."""
    lines = ("", "M0,0V8", "M0,0H8", "M0,8L8,0", "M0,0L8,8", "M0,0V8M0,0H8", "M0,8L8,0M0,0L8,8")
    patterns = [
        f'<pattern id="{_hatching_id(title, index)}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<rect width="8" height="8" fill="{_colour(index)}"/>'
        f'<path d="{lines[index % len(lines)]}" stroke="white" stroke-width="1.5"/></pattern>'
        for index in range(count)
    ]
    return f"<defs>{''.join(patterns)}</defs>"
