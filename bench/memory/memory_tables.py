"""The report of `memory` as tables: one model, or several side by side. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from microvlm.bench.memory.memory_records import (
    NeighbourKind,
    Neighbours,
    OpenValues,
    Part,
    RecallRow,
    Scores,
    SeveralParts,
    Tuning,
)
from microvlm.bench.memory.personalisation.personalisation_tables import personalisation_tables
from microvlm.bench.tables import Report, Table

Rows = list[list[str]]
Figures = list[tuple[str, str]]
"""Label and value, one a line of a table."""


def report(document: Part | SeveralParts) -> Report:
    """The report of one model, or of several as columns."""
    parts = document.subjects if isinstance(document, SeveralParts) else [document]
    labels = [part.label for part in parts]
    heads = [
        f"episodic memory of {part.provenance.model.name} on {part.backend}: {part.slots} slots"
        for part in parts
    ]
    remarks = []
    tables = []
    scored = [(part, scores) for part in parts if (scores := part.scores) is not None]
    for number, (part, scores) in enumerate(scored):
        title = "recall, facts written once and asked for with another view"
        several = len(parts) > 1
        name = f"recall-{number + 1}" if several else "recall"
        tables.append(Table(name, f"{title}: {part.label}" if several else title, _recall(scores.recall)))
    if scored:
        near, crowded = "after one fact", "beside many facts"
        title = "neighbours whose answer stays {}, by kind"
        names = [part.label for part, _ in scored]
        near_kinds = [scores.edit.neighbours for _, scores in scored]
        crowded_kinds = [scores.edit.crowded.neighbours for _, scores in scored]
        figures = [_figures(scores, part.slots) for part, scores in scored]
        tables += [
            Table("edits", "edits, forgetting, scope", _columns(names, figures)),
            Table("neighbours", title.format(near), _columns(names, list(map(_kinds, near_kinds)))),
            Table(
                "neighbours-crowded", title.format(crowded), _columns(names, list(map(_kinds, crowded_kinds)))
            ),
        ]
        remarks.append(f"a guess among the names is right in {scored[0][1].chance:.3f} of the cases")
    for part, _ in scored:
        if part.open_values is not None:
            tables += _open_values(part.open_values, f": {part.label}" if len(parts) > 1 else "")
    tuned = [(part.label, part.tuning) for part, _ in scored if part.tuning is not None]
    if tuned:
        title = "one fact written, or trained into the decoder"
        names = [label for label, _ in tuned]
        tables.append(Table("tuning", title, _columns(names, [_tuning(tuning) for _, tuning in tuned])))
    tables += [
        *personalisation_tables(parts),
        Table("latency", "time, ms (median)", _columns(labels, list(map(_latencies, parts)))),
        Table("cost", "cost", _costs(parts)),
    ]
    if any(part.concepts for part in parts):
        remarks.append(
            "weighted accuracy is the mean of both shares, .5 for always declining; look-alikes are the strangers that "
            "are nearest to a concept by the encoder's features, whose threshold was chosen on other objects"
        )
    return Report("; ".join(heads), tables, remarks)


def _columns(labels: Sequence[str], columns: Sequence[Figures]) -> Rows:
    """One column for each model; all have the same lines."""
    by_label = [dict(column) for column in columns]
    lines = dict.fromkeys(line for column in by_label for line in column)
    head = ["", "value"] if len(labels) == 1 else ["", *labels]
    return [head, *([line, *(column.get(line, "-") for column in by_label)] for line in lines)]


def _recall(rows: Sequence[RecallRow]) -> Rows:
    table = [
        [
            *("facts", "times", "memories", "recall", "95 %"),
            *("memory reset", "reset, gate open", "reading", "1-NN of latents", "in one memory"),
        ]
    ]
    for row in rows:
        shares = (row.control, row.control_gate_open, row.reading, row.nearest_neighbour, row.single)
        counts = [str(row.facts), str(row.trials), str(row.memories)]
        table.append([*counts, _share(row.accuracy), _interval(row.ci95), *map(_share, shares)])
    return table


def _figures(scores: Scores, slots: int) -> Figures:
    other, sequential, drift = scores.other_vendor, scores.sequential, scores.drift
    edit, forget, gate = scores.edit, scores.forget, scores.gate
    retention = f"retention after {sequential.edits} edits of {sequential.facts} facts"
    return [
        (f"another vendor's drawing, {other.facts} facts", _share(other.recall)),
        ("another vendor's drawing, 1-NN of latents", _share(other.nearest_neighbour)),
        ("edit: efficacy", _with_interval(edit.efficacy, edit.efficacy_ci95)),
        ("edit: paraphrase", _with_interval(edit.paraphrase, edit.paraphrase_ci95)),
        *_neighbourhood(edit, "one fact written"),
        *_neighbourhood(edit.crowded, f"{edit.crowded.facts_written} facts written"),
        ("forget: forgotten", _with_interval(forget.forgotten, forget.forgotten_ci95)),
        ("forget: retained", _with_interval(forget.retained, forget.retained_ci95)),
        ("forget: attack", _with_interval(forget.attack, forget.attack_ci95)),
        ("gate: auroc", _with_interval(gate.auroc, gate.auroc_ci95)),
        ("gate: eer", _with_interval(gate.eer, gate.eer_ci95)),
        *(
            (f"gate: {name} against {_words(kind)}", _share(share))
            for kind, against in gate.kinds.items()
            for name, share in (("auroc", against.auroc), ("eer", against.eer))
        ),
        ("gate: residual auroc", _share(gate.residual_auroc)),
        ("gate: residual eer", _share(gate.residual_eer)),
        (retention, _share(sequential.retention)),
        ("drift of the state then", f"{sequential.drift:.1e}"),
        (f"float32 against float64 after {drift.steps} mixed steps", f"{drift.float32_vs_float64:.1e}"),
        ("the same, never built anew", f"{drift.without_rebuilds:.1e}"),
        ("the same, built anew from the log", f"{drift.after_rebuild:.1e}"),
        ("slots in effect", f"{scores.addressing.effective_slots:.1f} of {slots}"),
    ]


def _neighbourhood(table: Neighbours, facts: str) -> Figures:
    return [
        (f"edit: neighbourhood, {facts}", _with_interval(table.neighbourhood, table.neighbourhood_ci95)),
        (f"edit: neighbourhood without gate, {facts}", _share(table.neighbourhood_without_gate)),
    ]


def _kinds(neighbours: dict[str, NeighbourKind]) -> Figures:
    figures: Figures = []
    for name, kind in neighbours.items():
        figures += [
            (f"{_words(name)}, {kind.cases} cases", f"{kind.kept:.3f} ({_interval(kind.ci95)})"),
            (f"{_words(name)}, without gate", f"{kind.kept_without_gate:.3f}"),
        ]
    return figures


def _tuning(tuning: Tuning) -> Figures:
    return [
        (f"written, ms (median of {tuning.facts} facts)", f"{tuning.write_ms:.2f}"),
        ("written on torch, ms", f"{tuning.write_torch_ms:.2f}"),
        ("trained, ms", f"{tuning.tuning_ms:.0f}"),
        ("trained, steps", f"{tuning.steps:.0f}"),
        ("trained / written, times as long", f"{tuning.tuning_over_write:.0f}"),
        ("written: answered right", _share(tuning.written)),
        ("written: paraphrase", _share(tuning.written_paraphrase)),
        ("written: neighbours' answers that stay", _share(tuning.written_neighbourhood)),
        ("trained: answered right", _share(tuning.tuned)),
        ("trained: paraphrase", _share(tuning.tuned_paraphrase)),
        ("trained: neighbours' answers that stay", _share(tuning.tuned_neighbourhood)),
    ]


def _open_values(values: OpenValues, label: str) -> list[Table]:
    recall = [
        [
            *("facts", "asked for", "times", "right", "95 %", "wrong", "95 %", "not in this memory"),
            *("nearest key alone", "from the decoder"),
        ]
    ]
    for row in values.rows:
        shares = (_share(row.right), _interval(row.right_ci95), _share(row.wrong), _interval(row.wrong_ci95))
        others = map(_share, (row.not_found, row.nearest_key, row.decoder))
        recall.append([str(row.facts), row.asked, str(row.trials), *shares, *others])
    strangers = [["facts", "strangers", "let in", "95 %", "by the nearest key", "by the scope detector"]]
    for stranger in values.strangers:
        let_in = (_share(stranger.let_in), _interval(stranger.let_in_ci95))
        others = map(_share, (stranger.nearest_key, stranger.decoder))
        strangers.append([str(stranger.facts), str(stranger.strangers), *let_in, *others])
    lengths = [["tokens of the value", "values", "said exactly by the decoder", "95 %"]]
    for length in values.decoder_by_length:
        lengths.append(
            [length.tokens, str(length.values), _share(length.exact), _interval(length.exact_ci95)]
        )
    tables = [
        Table("open-values", f"facts with any values, their own text{label}", recall),
        Table("strangers", f"pictures never told of, under the question of all facts{label}", strangers),
        Table("decoder-lengths", f"what the decoder says from the reading alone{label}", lengths),
    ]
    return [table for table in tables if len(table.rows) > 1]


def _latencies(part: Part) -> Figures:
    return [(_words(name), f"{value:.3f}") for name, value in part.latency_ms.items()]


def _costs(parts: Sequence[Part]) -> Rows:
    sizes = list({size.name: size for part in parts for size in part.costs.sizes}.values())
    measured = ["measured, time"] if len(parts) == 1 else [f"measured: {part.label}" for part in parts]
    table = [
        ["", *measured, *(f"predicted, multiplications: {size.name}" for size in sizes), "bar, full size"]
    ]
    counted = (
        [size.predicted_read_write_share_of_answer for size in sizes],
        [size.predicted_encode_share_of_prefill for size in sizes],
    )
    labels = ("read + write, of an answer of 50 tokens", "encode, of the prefill")
    for index, (label, predicted) in enumerate(zip(labels, counted, strict=True)):
        bars = [part.costs.bars[index] for part in parts]
        cells = [_percent(bar.value) + {True: ", met", False: ", NOT MET", None: ""}[bar.met] for bar in bars]
        table.append([label, *cells, *map(_percent, predicted), f"<= {_percent(bars[0].at_most)}"])
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f}-{ends[1]:.3f}"


def _with_interval(share: float | None, ends: Sequence[float] | None) -> str:
    """A share and, where there is one, its 95 % interval."""
    return _share(share) + (f" ({_interval(ends)})" if ends else "")


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
