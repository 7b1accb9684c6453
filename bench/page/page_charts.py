"""Charts of saved documents, by kind: a caption and an SVG each. A chart whose figures a document lacks is left out.

What is measured and what is predicted stand in different charts, or in one with both words in its legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from microvlm.bench.equivalence.equivalence_records import EquivalenceReport
from microvlm.bench.kernels.kernel_records import KernelReport
from microvlm.bench.memory import memory_plots
from microvlm.bench.peers.peer_records import PeerReport
from microvlm.bench.pi.pi_records import PiReport, PublishedSpeed
from microvlm.bench.scores import answer_plots
from microvlm.bench.speed.phases import PHASES
from microvlm.bench.speed.speed_records import SpeedReport
from microvlm.bench.svg_plots import Axis, Line, Points, chart, scatter, stacked

Chart = tuple[str, str]
"""A caption and an SVG."""
_STACKED = tuple(phase for phase in PHASES if phase not in ("load", "end_to_end"))


def charts_of(kind: str, document: dict[str, Any]) -> list[Chart]:
    """The charts of a document that `report.parse_report` has read."""
    draw = _DRAWN.get(kind)
    return [] if draw is None else list(draw(document))


def size_and_quality(documents: Iterable[tuple[str, dict[str, Any]]]) -> Chart | None:
    """Bytes of every compared model over its share of right captions; None without such documents."""
    points = []
    for kind, document in documents:
        if kind == "equivalence" and "caption" in document["accuracy"]:
            report = msgspec.convert(document, EquivalenceReport)
            model = document["provenance"].get("model") or {}
            if model.get("total_bytes"):
                share = report.accuracy["caption"].candidate
                points.append((model["total_bytes"] / 1e6, share, report.candidate.model))
    if not points:
        return None
    sizes, shares, names = (list(column) for column in zip(*points, strict=True))
    x = Axis("megabytes of the bundle (log scale)", *_decades(sizes), _ticks(*_decades(sizes)), log=True)
    group = Points("captions of the evaluation pictures, measured", sizes, shares, names)
    y = Axis("answered right", 0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1))
    return "Size against quality: up and to the left is better.", scatter("Size and quality", [group], x, y)


def history_chart(title: str, series: Mapping[str, Sequence[float]]) -> Chart:
    """Figures over stored results, oldest first, each relative to its first: 1 is as at the beginning."""
    lines = [
        Line(name, range(1, len(values) + 1), [value / values[0] for value in values])
        for name, values in series.items()
    ]
    shares = [share for line in lines for share in line.y]
    longest = max(len(line.x) for line in lines)
    low, high = min(0.8, *shares) * 0.98, max(1.2, *shares) * 1.02
    x = Axis("result, oldest first", 1, max(longest, 2), sorted({1, longest, max(2, longest // 2)}))
    y = Axis("times the first result", low, high, [round(low, 2), 1, round(high, 2)])
    return f"{title}: below 1 is faster than at the beginning.", chart(
        title, lines, x, y, legend=(0.03, 0.06)
    )


def _speed(document: dict[str, Any]) -> Iterable[Chart]:
    report = msgspec.convert(document, SpeedReport)
    measured = {
        result.label: {name: result.phases[name].median_ms for name in _STACKED if name in result.phases}
        for result in report.results
        if result.phases
    }
    if measured:
        names = ", ".join(model.name for model in report.provenance.models)
        title = f"Latency by phase, {names}"
        yield (
            "Measured medians of each phase once, one behind the other; a caption decodes several tokens.",
            stacked(title, measured, "milliseconds, measured"),
        )


def _kernels(document: dict[str, Any]) -> Iterable[Chart]:
    report = msgspec.convert(document, KernelReport)
    for threads in sorted({row.threads for row in report.rows}):
        rows = [
            row for row in report.rows if row.threads == threads and min(row.gb_per_s, row.gmac_per_s) > 0
        ]
        if not rows:
            continue
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            ours = "ours" if row.contender.startswith("ours") else "ONNX Runtime's own"
            intensity = row.gmac_per_s / row.gb_per_s
            points.setdefault(f"{ours}, {row.regime}", []).append((intensity, row.gmac_per_s))
        bandwidth = report.provenance.stream_gb_per_s.get(str(threads), 0)
        if bandwidth <= 0:
            continue
        every = [point for group in points.values() for point in group]
        low_x, high_x = _decades([x for x, _ in every])
        low_y, high_y = _decades([y for _, y in every] + [bandwidth * low_x])
        ends = (low_x, min(high_x, high_y / bandwidth))
        roof = Line(f"memory at {bandwidth:.0f} GB/s", ends, [bandwidth * end for end in ends])
        groups = [Points(name, *map(list, zip(*group, strict=True))) for name, group in points.items()]
        x = Axis("multiply-adds a byte of weights (log)", low_x, high_x, _ticks(low_x, high_x), log=True)
        y = Axis("billion multiply-adds a second (log)", low_y, high_y, _ticks(low_y, high_y), log=True)
        yield (
            "Every kernel, measured. Above the line weights came from a cache; far to the right arithmetic limits.",
            scatter(f"Roofline, {threads} thread{'s' * (threads > 1)}", groups, x, y, [roof]),
        )


def _peers(document: dict[str, Any]) -> Iterable[Chart]:
    report = msgspec.convert(document, PeerReport)
    for threads in dict.fromkeys(row.threads for row in report.rows):
        for phase in ("decode", "prefill"):
            speeds = {
                row.name: {phase: speed.value}
                for row in report.rows
                if row.threads == threads and (speed := getattr(row, f"{phase}_tokens_per_s")) is not None
            }
            title = f"{phase.capitalize()}, {report.shape.name}, {threads} thread{'s' * (threads > 1)}"
            if speeds:
                yield (
                    "Measured in turns; weights have other bits and bytes from bar to bar.",
                    stacked(title, speeds, "tokens a second, measured"),
                )


def _equivalence(document: dict[str, Any]) -> Iterable[Chart]:
    report = msgspec.convert(document, EquivalenceReport)
    name = f"{report.candidate.model} on {report.candidate.backend}"
    if report.kl_quantiles:
        floor = 1e-9
        values = [max(value, floor) for _, value in report.kl_quantiles]
        low, high = _decades(values)
        line = Line("positions", values, [percent / 100 for percent, _ in report.kl_quantiles])
        x = Axis("KL, nats (log scale)", low, high, _ticks(low, high), log=True)
        y = Axis("share of positions below", 0, 1, (0, 0.25, 0.5, 0.75, 1))
        equal = f" Less than {floor:g} is drawn as {floor:g}." if report.kl_quantiles[0][1] < floor else ""
        yield (
            f"KL divergence of {report.positions} positions, smallest to largest.{equal}",
            chart(f"KL distribution, {name}", [line], x, y),
        )
    if report.margin_quantiles:
        values = [max(value, 1e-4) for _, value in report.margin_quantiles]
        flipped = [max(value, 1e-4) for value in report.flipped_margins or []]
        low, high = _decades([*values, *flipped])
        line = Line("all positions", values, [percent / 100 for percent, _ in report.margin_quantiles])
        groups = [
            Points(f"{len(flipped)} positions whose likeliest token differs", flipped, [0.02] * len(flipped))
        ]
        x = Axis("distance of the two likeliest logits (log scale)", low, high, _ticks(low, high), log=True)
        y = Axis("share of positions below", 0, 1, (0, 0.25, 0.5, 0.75, 1))
        yield (
            "Near-ties: a choice may turn where the two likeliest tokens were nearly equal, at the left.",
            scatter(f"Near-ties, {name}", groups, x, y, [line]),
        )


def _pi(document: dict[str, Any]) -> Iterable[Chart]:
    report = msgspec.convert(document, PiReport)
    speeds: list[PublishedSpeed] = [*report.model.anchors, report.model.held_out]
    published = [
        math.sqrt(speed.published_tokens_per_s[0] * speed.published_tokens_per_s[1]) for speed in speeds
    ]
    predicted = [speed.predicted_tokens_per_s for speed in speeds]
    names = [speed.name for speed in speeds]
    low, high = _decades([*published, *predicted])
    fitted = len(report.model.anchors)
    groups = [
        Points("the model was fitted to these", published[:fitted], predicted[:fitted], names[:fitted]),
        Points("held out", published[fitted:], predicted[fitted:], names[fitted:]),
    ]
    ticks = _ticks(low, high)
    x = Axis("published tokens/s (log scale)", low, high, ticks, log=True)
    y = Axis("predicted tokens/s (log scale)", low, high, ticks, log=True)
    yield (
        f"Speeds that others published, and what the model of our predictions for {report.profile.name} gives.",
        scatter(
            "Predicted against published",
            groups,
            x,
            y,
            [Line("predicted as published", (low, high), (low, high))],
        ),
    )


def _memory(document: dict[str, Any]) -> Iterable[Chart]:
    for part in document.get("subjects", [document]):
        if "recall" in part:
            yield "Recall over the number of facts, with its 95 % band.", memory_plots.recall_curve(part)


def _answers(document: dict[str, Any]) -> Iterable[Chart]:
    if document.get("risk_coverage") is not None:
        yield "What share is wrong where only the surest are answered.", answer_plots.risk_coverage(document)
    if document.get("calibration") is not None:
        yield "How often answers of a confidence are right.", answer_plots.reliability(document)


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around the values."""
    low = 10.0 ** math.floor(math.log10(min(values)))
    high = 10.0 ** math.ceil(math.log10(max(values)))
    return low, high if high > low else low * 10


def _ticks(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**power for power in range(first, last + 1, 1 + (last - first) // 7)]


_DRAWN: dict[str, Callable[[dict[str, Any]], Iterable[Chart]]] = {
    "run": _speed,
    "kernels": _kernels,
    "peers": _peers,
    "equivalence": _equivalence,
    "pi": _pi,
    "memory": _memory,
    "answers": _answers,
}
