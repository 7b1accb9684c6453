"""The report of `microvlm-bench run` as tables. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from microvlm.bench.records import ModelFiles
from microvlm.bench.speed.phases import PHASES
from microvlm.bench.speed.speed_records import Emulated, Ratio, Result, SpeedReport, Times
from microvlm.bench.tables import Report, Rows, Table


def report(document: SpeedReport) -> Report:
    ran = [result for result in document.results if result.status == "ok"]
    emulated = [
        (result.label, result.emulated)
        for result in document.results
        if result.emulated is not None and result.emulated.predicted_ms
    ]
    tables = []
    if ran or emulated:
        title = "time, ms: median (p90)" if ran else "no measured times"
        tables.append(Table("phases", title, _phase_rows(ran, emulated)))
    if ran:
        tables.append(Table("memory", "speed and memory", _memory_rows(ran)))
    if document.ratios:
        tables.append(Table("ratios", "ratio of medians [95 % interval]", _ratio_rows(document.ratios)))
    models = document.provenance.models
    tables.append(Table("files", "files, bytes", _file_rows(models)))
    remarks = [
        f"{result.label} {result.status}: {result.reason}" for result in document.results if result.reason
    ]
    remarks += [sentence for result in document.results for sentence in _emulation(result)]
    if ran and document.ceiling is not None:
        remarks.append(_ceiling(document.ceiling.read_bandwidth_bytes_per_s, ran[0]))
    head = "; ".join(f"{model.name}: {model.total_bytes / 1e6:.2f} MB" for model in models)
    return Report(head, tables, remarks)


def _ceiling(bytes_per_s: float, result: Result) -> str:
    return (
        f"ceiling: one core reads {bytes_per_s / 1e9:.1f} GB/s from memory "
        f"here and a token reads {(result.weight_bytes_per_token or 0) / 1e6:.2f} MB of weights; weights that fit a "
        "cache may pass it, and calls of small operators stay far below it"
    )


def _file_rows(models: Sequence[ModelFiles]) -> Rows:
    names = dict.fromkeys(name for model in models for name in model.files)
    ordered = sorted(names, key=lambda name: -max(model.files.get(name, 0) for model in models))
    rows = [["file", *(model.name for model in models)]]
    return rows + [[name, *(f"{model.files.get(name, 0):,}" for model in models)] for name in ordered]


def _phase_rows(ran: Sequence[Result], emulated: Sequence[tuple[str, Emulated]]) -> Rows:
    """Measured columns, then for each emulated backend instructions and predicted milliseconds, named so."""
    rows = [["phase", *(result.label for result in ran)]]
    for name, _ in emulated:
        rows[0] += [f"{name}: M instructions", f"{name}: predicted ms"]
    for phase in PHASES:
        label = f"{phase} (a token)" if phase == "decode" else phase
        row = [label, *(_time(result.phases.get(phase)) for result in ran)]
        for _, figures in emulated:
            row += _prediction(figures, phase)
        rows.append(row)
    return rows


def _time(times: Times | None) -> str:
    return f"{times.median_ms:.2f} ({times.p90_ms:.2f})" if times else "-"


def _prediction(emulated: Emulated, phase: str) -> list[str]:
    predicted = (emulated.predicted_ms or {}).get(phase)
    counted = (emulated.counted_instructions or {}).get(phase)
    if predicted is None or counted is None:
        return ["-", "-"]
    ends = [f"{end:.1f}" for end in (predicted.low, predicted.high)]
    return [f"{counted / 1e6:.2f}", "-".join(dict.fromkeys(ends))]


def _emulation(result: Result) -> list[str]:
    """Remarks on an emulated backend: the meaning of its columns, and the verdict on its equivalence."""
    emulated = result.emulated
    if emulated is None:
        return []
    sentences = []
    if emulated.predicted_ms:
        sentences.append(
            f"{result.label}: no time of it was measured. Instructions are of {emulated.counts_from}, of one "
            f"thread of a {emulated.cpu}, with an image and 15 tokens of text; times are predicted from them for a "
            f"{emulated.board}, at both ends of its memory bandwidth, and may be wrong by a factor of two"
        )
    compared = emulated.equivalence
    if compared is not None:
        sentence = (
            f"{result.label} on an emulated {emulated.cpu} against {compared.against}: {compared.verdict}"
        )
        if compared.sums is not None:
            equal = compared.sums - (compared.sums_differing or 0)
            sentence += f", {equal:,} of {compared.sums:,} integer sums equal"
        sentences.append(sentence)
    return sentences


def _memory_rows(ran: Sequence[Result]) -> Rows:
    rows = [["", *(result.label for result in ran)]]
    rows.append(["decode, tokens/s", *(f"{result.decode_tokens_per_s or 0:.1f}" for result in ran)])
    rows.append(
        ["share of ceiling", *(f"{100 * (result.decode_share_of_ceiling or 0):.1f} %" for result in ran)]
    )
    for label, figures in (
        ("peak RSS, MB", [result.peak_rss_bytes for result in ran]),
        ("anonymous, MB", [result.anonymous_bytes for result in ran]),
        ("of which the model's, MB", [result.anonymous_of_model_bytes for result in ran]),
        ("file-backed, MB", [result.file_backed_bytes for result in ran]),
        ("PSS, MB", [result.pss_bytes for result in ran]),
    ):
        rows.append([label, *("-" if figure is None else f"{figure / 1e6:.1f}" for figure in figures)])
    rows.append(["path", *(str(result.path) for result in ran)])
    return rows


def _ratio_rows(ratios: Sequence[Ratio]) -> Rows:
    rows = [["phase", "backends", "ratio"]]
    for ratio in ratios:
        interval = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        rows.append([ratio.phase, f"{ratio.backend} / {ratio.against}", interval])
    return rows
