"""The report of `microvlm-bench pi` as tables. Measures nothing."""

from __future__ import annotations

from microvlm.bench.pi.counting import peer_counts
from microvlm.bench.pi.pi_records import (
    OURS,
    Fit,
    FitReport,
    PiReport,
    PredictionModel,
    ResidentMemory,
)
from microvlm.bench.pi.profile_records import NUMBERS, Profile
from microvlm.bench.records import Bar
from microvlm.bench.tables import Report, Table


def report(document: PiReport) -> Report:
    profile = document.profile
    state = "calibrated" if profile.calibrated else "uncalibrated"
    model = document.provenance.model.name
    head = f"{model} on {document.target}; predictions for {profile.name}, {state}"
    parts = (_equivalence, _cost, _cycles, _predicted, _by_tables, _measured, _peers, _bars, _fit)
    tables = [table for table in (part(document) for part in parts) if table is not None]
    tables += [] if document.fit is None else serve_tables(document.fit)
    tables += [_profile(profile), _model(document.model)]
    remarks = [
        "counted: on an emulated CPU, one thread; predicted: from counts, bytes and the profile, a factor of 2 either "
        "way until somebody calibrates; nothing here was measured on a board unless it says so"
    ]
    if document.predicted_timings_ms is not None:
        remarks.append(
            "cycles: of the code that was executed, by two tables of the core's timings, every load from the first "
            "cache; times by them take an equal part for each core"
        )
    counted = profile.cpu if document.counted_on is None else document.counted_on.cpu
    if counted != profile.cpu:
        remarks.append(
            f"the counts are of a {counted}, which runs other kernels than {profile.name}'s {profile.cpu}: leave "
            "--target away, or name that core"
        )
    return Report(head, tables, remarks)


def _cost(document: PiReport) -> Table | None:
    if document.cost is None or document.counted_on is None:
        return None
    rows = [["phase", "instructions, M", "of them SIMD, M", "in our kernels, M", "weights, MB"]]
    for row in document.cost:
        figures = (row.instructions, row.simd, row.kernel_instructions, row.weight_bytes)
        rows.append([row.phase, *(f"{figure / 1e6:.2f}" for figure in figures)])
    title = f"instructions counted on an emulated {document.counted_on.cpu}"
    return Table("counts", title, rows)


def _cycles(document: PiReport) -> Table | None:
    rows = [["phase", "instructions, M", "cycles by published timings, M", "by llvm-mca, M"]]
    for row in document.cost or ():
        if row.predicted_timings_kernel_cycles is None:
            continue
        mca = row.predicted_mca_kernel_cycles
        figures = (row.kernel_instructions, row.predicted_timings_kernel_cycles)
        by_mca = "-" if mca is None else f"{mca / 1e6:.2f}"
        rows.append([row.phase, *(f"{figure / 1e6:.2f}" for figure in figures), by_mca])
    title = "our kernels on one core: instructions counted, cycles predicted"
    return Table("cycles", title, rows) if len(rows) > 1 else None


def _by_tables(document: PiReport) -> Table | None:
    tables = {
        "published timings": document.predicted_timings_ms,
        "llvm-mca": document.predicted_mca_ms,
    }
    shown = {name: times for name, times in tables.items() if times is not None}
    if not shown:
        return None
    numbers = document.profile.numbers
    ends = (numbers.bandwidth_low_bytes_per_s, numbers.bandwidth_high_bytes_per_s)
    head = [f"by {name}, at {end.value / 1e9:.2g} GB/s" for name in shown for end in ends]
    rows = [["phase", *head]]
    for together in zip(*shown.values(), strict=True):
        rows.append([together[0].phase, *(f"{ms:.1f}" for time in together for ms in (time.high, time.low))])
    return Table("predicted_by_tables", "predicted from cycles, ms", rows)


def _predicted(document: PiReport) -> Table | None:
    if document.predicted_ms is None:
        return None
    numbers = document.profile.numbers
    ends = (numbers.bandwidth_low_bytes_per_s, numbers.bandwidth_high_bytes_per_s)
    rows = [["phase", *(f"at {end.value / 1e9:.2g} GB/s" for end in ends)]]
    rows += [[time.phase, f"{time.high:.1f}", f"{time.low:.1f}"] for time in document.predicted_ms]
    return Table("predicted", "predicted, ms", rows)


def _measured(document: PiReport) -> Table | None:
    if document.measured_ms is None:
        return None
    rows = [["phase", "median", "p90"]]
    rows += [[time.phase, f"{time.median_ms:.1f}", f"{time.p90_ms:.1f}"] for time in document.measured_ms]
    return Table("measured", "measured, ms", rows)


def _peers(document: PiReport) -> Table | None:
    if document.peers is None:
        return None
    rows = [["one token, full size", "instructions, M", "weights, MB", "times ours-2bit"]]
    ours = {row.contender: row.instructions_per_token for row in document.peers}[OURS]
    for row in document.peers:
        rows.append(
            [
                row.contender,
                f"{row.instructions_per_token / 1e6:.1f}",
                f"{row.weight_bytes_per_token / 1e6:.1f}",
                f"{row.instructions_per_token / ours:.2f}",
            ]
        )
    title = f"ONNX Runtime's own paths, {peer_counts.LAYERS} layers and a head of {peer_counts.VOCABULARY:,}"
    return Table("peers", title, rows)


def _bars(document: PiReport) -> Table | None:
    if not document.bars:
        return None
    return Table("bars", "bars", [["bar", "value", "demanded", "met"], *map(_bar_row, document.bars)])


def _bar_row(bar: Bar) -> list[str]:
    demanded = f"<= {bar.at_most:,}" if bar.at_most is not None else f">= {bar.at_least:,}"
    value = "-" if bar.value is None else f"{bar.value:,}"
    return [bar.name, value, demanded, "yes" if bar.met else "NO"]


def _fit(document: PiReport) -> Table | None:
    return None if document.fit is None else fit_table(document.fit)


def fit_table(fit: Fit) -> Table:
    """A row for each run of a `measure_fit` document; MB of 10^6 bytes, memory of the board in MiB."""
    rows = [["model", "program", "board's memory, MiB", "peak RSS, MB", "left, MB", "out of memory"]]
    for run in fit.runs:
        megabytes = (f"{figure / 1e6:.1f}" for figure in (run.peak_rss_bytes, run.available_bytes))
        oom = "yes" if run.oom else "no"
        rows.append([run.model, run.program, f"{run.ram_bytes / (1 << 20):.0f}", *megabytes, oom])
    return Table("fit", "whole programs on an emulated board", rows)


def serve_tables(fit: Fit) -> list[Table]:
    """Memory of the server's processes, and what it answered; empty where nothing was served."""
    runs = [run for run in fit.runs if run.memory is not None]
    if not runs:
        return []
    memory = [["model", "process", "peak RSS, MB", "anonymous, MB", "file-backed, MB", "PSS, MB"]]
    answers = [["model", "request", "answer", "from"]]
    for run in runs:
        assert run.memory is not None
        for name in ("server", "worker", "together"):
            part: ResidentMemory = getattr(run.memory, name)
            figures = (part.peak_rss_bytes or part.rss_bytes, part.anonymous_bytes, part.file_backed_bytes)
            pss = "-" if part.pss_bytes is None else f"{part.pss_bytes / 1e6:.1f}"
            memory.append([run.model, name, *(f"{figure / 1e6:.1f}" for figure in figures), pss])
        answers += [[run.model, each.request, each.answer, each.source] for each in run.answers]
    return [
        Table("serve", "microvlm serve on the emulated board", memory),
        Table("answers", "what it answered over HTTP", answers),
    ]


def fit_report(document: FitReport) -> Report:
    """The document of `nox -s pi-fit`."""
    remarks = ["peaks and the OOM killer are those of the emulated board's kernel; its times mean nothing"]
    served = serve_tables(document.fit)
    if served:
        remarks.append(
            "`serve` is two processes, and its peak RSS the sum of theirs; together: at one moment, sampled twice a "
            "second; PSS counts pages that several processes map once; what is left is less by the visitor's own Python"
        )
    return Report("does a model fit a board?", [fit_table(document.fit), *served], remarks)


def _equivalence(document: PiReport) -> Table | None:
    compared = document.equivalence
    if compared is None:
        return None
    rows = [
        ["ort-arm64 against", "verdict", "integer sums equal", "codes at a tie", "replayed logits differ by"]
    ]
    for name, part in (("torch", compared), ("ort", compared.against_ort)):
        replay = part.replay
        difference = replay.logits_max_abs_diff
        figures = ["-", "-", "-"]
        if replay.codes is not None:
            shown = "-" if difference is None else f"{difference:.1e}"
            figures = [replay.sums_equal, replay.differing_codes, shown]
        rows.append([name, part.verdict, *figures])
    return Table("equivalence", "equivalence", rows)


def _profile(profile: Profile) -> Table:
    """An assumption is one in the table too, not only in the file."""
    rows = [["number", "value", "it is", "source"]]
    entries = [(name, profile.entry(name)) for name in NUMBERS]
    rows += [[name, f"{entry.value:g}", entry.basis, entry.source] for name, entry in entries]
    return Table("profile", f"{profile.name}, as the predictions take it", rows)


def _model(model: PredictionModel) -> Table:
    rows = [["published, tokens/s", "reported", "by the model", "error", "source"]]
    for label, anchor in [*(("fitted", anchor) for anchor in model.anchors), ("not fitted", model.held_out)]:
        low, high = anchor.published_tokens_per_s
        reported = f"{low:g}" if low == high else f"{low:g}-{high:g}"
        rows.append(
            [
                f"{anchor.name} ({label})",
                reported,
                f"{anchor.predicted_tokens_per_s:.2f}",
                f"{anchor.error:+.0%}",
                anchor.source,
            ]
        )
    return Table("model", "the model behind the predictions", rows)
