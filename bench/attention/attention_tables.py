"""The report of `microvlm-bench attention` as tables. Measures nothing."""

from __future__ import annotations

from statistics import fmean

from microvlm.bench.attention.attention_records import (
    AttentionReport,
    Comparison,
    HeadAttention,
    Isotropy,
    LayerAttention,
    LookedAt,
    Side,
)
from microvlm.bench.records import Interval
from microvlm.bench.tables import Report, Rows, Table


def report(document: AttentionReport) -> Report:
    comparison = document.comparison
    against = f" against {_named(comparison.against)}" if comparison else ""
    head = (
        f"attention of {_named(document.model)}{against}: {document.pictures} pictures of {document.source}, "
        f"'{document.prompt}' ({document.text_tokens} text tokens x {document.prefix_tokens} prefix embeddings)"
    )
    tables = [
        Table("layers", "attention by layer, mean over heads", _layers(document.model)),
        Table("heads", "entropy by head, as a share of an even one's", _heads(document)),
        Table("isotropy", "are codes spread evenly?", _isotropy(document)),
        Table("null", "the statistic of one slice under its null", _null(document)),
    ]
    remarks = [
        "shares of a text token's attention; entropy, sparsity and max over the prefix embeddings; slot: where the "
        "memory's slot may be seen, else it has no attention",
        f"isotropy: Epps-Pulley statistic, mean of {document.slices} slices, directions of length sqrt(width); null: "
        f"{document.draws} draws of evenly spread directions, as many of the same width",
    ]
    if document.examples:
        tables.append(Table("examples", "where each word of an answer looked", _examples(document.examples)))
    if comparison:
        tables.append(
            Table("drift", "how far the two models' attention is apart", _drift(document, comparison))
        )
        remarks.append(
            f"drift: two-sample statistic by {comparison.swaps} swaps within pictures; nats: Jensen-Shannon divergence "
            "over the prefix embeddings, of the two models and, beside it, of two pictures; "
            + _verdict(comparison)
        )
    return Report(head, tables, remarks)


def _examples(examples: list[LookedAt]) -> Rows:
    rows = [["picture", "right", "answer", "word", "looked most at", "attention to the picture"]]
    for each in examples:
        rows += [[each.picture, each.right, each.answer, one.word, one.place, one.note] for one in each.maps]
    return rows


def _verdict(comparison: Comparison) -> str:
    p_value = comparison.test.p_value
    if p_value < 0.05:
        return f"attention drifted (p {_p(p_value)})"
    return f"no drift was found (p {_p(p_value)})"


def _named(side: Side) -> str:
    widths = [
        *([] if side.decoder_bits is None else [f"{side.decoder_bits:g} bits"]),
        *([] if side.embedding_bits is None else [f"embedding {side.embedding_bits:g}"]),
    ]
    return f"{side.model} ({', '.join(widths)})" if widths else side.model


def _layers(side: Side) -> Rows:
    rows = [
        [
            "layer",
            "entropy, nats",
            "of even",
            "sparsity",
            "mean (on prefix)",
            "max",
            "on text",
            "on slot",
            "between pictures, nats",
        ]
    ]
    for number, layer in enumerate(side.layers):
        values = [f"{_mean(layer, name):.3f}" for name in _COLUMNS]
        rows.append([str(number), *values, f"{layer.picture_divergence:.4f}"])
    return rows


_COLUMNS = ("entropy", "relative_entropy", "sparsity", "mean", "max", "text", "slot")


def _mean(layer: LayerAttention, name: str) -> float:
    return fmean(_value(head, name) for head in layer.heads)


def _value(head: HeadAttention, name: str) -> float:
    value: float = getattr(head, name)
    return value


def _heads(document: AttentionReport) -> Rows:
    count = document.shown_heads
    rows = [["layer", *(f"head {head}" for head in range(count))]]
    rows += [
        [str(number), *(f"{head.relative_entropy:.3f}" for head in layer.heads[:count])]
        for number, layer in enumerate(document.model.layers)
    ]
    return rows


def _isotropy(document: AttentionReport) -> Rows:
    sides = [document.model, *([document.comparison.against] if document.comparison else [])]
    rows = [
        [
            "codes",
            "model",
            "samples x width",
            "T",
            "T under the null: mean / 95 % / 99 %",
            "p",
            "length of the mean direction",
            "effective rank",
        ]
    ]
    for side in sides:
        rows += [_isotropy_row(side, row) for row in side.isotropy]
    return rows


def _isotropy_row(side: Side, row: Isotropy) -> list[str]:
    return [
        row.features,
        side.model,
        f"{row.samples} x {row.width}",
        f"{row.statistic:.2f}",
        f"{row.null_mean:.2f} / {row.null_95:.2f} / {row.null_99:.2f}",
        _p_with_interval(row.p_value, row.p_interval),
        f"{row.mean_length:.3f}",
        f"{row.effective_rank:.1f}",
    ]


def _null(document: AttentionReport) -> Rows:
    null = document.null
    figures = (null.mean, null.quantile_95, null.quantile_99)
    return [["", "mean", "95 %", "99 %"], ["T of one slice", *(f"{value:.2f}" for value in figures)]]


def _drift(document: AttentionReport, comparison: Comparison) -> Rows:
    rows = [
        [
            "layer",
            "statistic",
            "under swaps",
            "p",
            "p, all layers",
            "nats",
            "two pictures, nats",
            "largest weight",
        ]
    ]
    for number, (layer, own) in enumerate(zip(comparison.layers, document.model.layers, strict=True)):
        test = layer.test
        rows.append(
            [
                str(number),
                f"{test.statistic:.4f}",
                f"{test.null_mean:.4f}",
                _p_with_interval(test.p_value, test.p_interval),
                _p(layer.p_holm),
                f"{layer.divergence:.5f}",
                f"{own.picture_divergence:.4f}",
                f"{layer.largest:.4f}",
            ]
        )
    test = comparison.test
    p_value = _p_with_interval(test.p_value, test.p_interval)
    rows.append(["all", f"{test.statistic:.4f}", f"{test.null_mean:.4f}", p_value, "-", "-", "-", "-"])
    return rows


def _p(value: float) -> str:
    return f"{value:.4f}"


def _p_with_interval(value: float, interval: Interval) -> str:
    return f"{_p(value)} [{interval[0]:.4f}, {interval[1]:.4f}]"
