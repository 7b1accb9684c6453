"""The reports of `microvlm-bench full` and `sizes` as tables. Measures nothing."""

from __future__ import annotations

from microvlm.bench.full.full_records import FullReport, SizesReport
from microvlm.bench.records import Bar
from microvlm.bench.tables import Report, Table


def report(document: FullReport) -> Report:
    full, facts = document.full, document.provenance
    streams = ", ".join(f"{value:.1f} GB/s" for value in facts.stream_gb_per_s.values())
    head = f"{facts.model.name}: decoder on ONNX Runtime, {full.kernels}; memory read at {streams}"
    rows = [
        ["", "value"],
        [f"prefill of {full.prompt_tokens}, tokens/s", f"{full.prefill_tokens_per_s:.1f}"],
        ["decode, tokens/s", f"{full.decode_tokens_per_s:.1f}"],
        ["weights of a token, MB", f"{full.weight_bytes_per_token / 1e6:.1f}"],
        ["decode, GB/s of weights", f"{full.decode_gb_per_s:.1f}"],
        ["share of the streaming roofline", f"{full.decode_roofline_share:.0%}"],
        ["anonymous memory of the model, MB", _megabytes(full.anonymous_of_model_bytes)],
        ["of the tokenizer, apart, MB", _megabytes(full.tokenizer_anonymous_bytes)],
        ["file-backed memory, MB", _megabytes(full.file_backed_bytes)],
        ["load, ms", f"{full.load_ms:.0f}"],
    ]
    bar_rows = [["bar", "value", "demanded", "met"], *map(_bar_row, document.bars)]
    remarks = ["speeds are demanded in proportion to what one thread reads here: 15 GB/s is the measure"]
    return Report(
        head, [Table("decoder", "full-size decoder", rows), Table("bars", "bars", bar_rows)], remarks
    )


def _bar_row(bar: Bar) -> list[str]:
    demanded = f"<= {bar.at_most:,}" if bar.at_most is not None else f">= {bar.at_least:.1f}"
    verdict = {True: "yes", False: "NO", None: "-"}[bar.met]
    return [bar.name, f"{bar.value:,}" if bar.value is not None else "-", demanded, verdict]


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"


def sizes_report(document: SizesReport) -> Report:
    """The document as one table; each row also says what it saves against the first."""
    whole = document.bundles[0].bundle_bytes
    rows = [
        [
            "packing",
            "tokens",
            "layers",
            "memory slots",
            "bundle, MB",
            "against the first, MB",
            "read a token, MB",
        ]
    ]
    for bundle in document.bundles:
        rows.append(
            [
                bundle.packing,
                f"{bundle.vocabulary:,}",
                str(bundle.layers),
                str(bundle.slots),
                f"{bundle.bundle_bytes / 1e6:.1f}",
                f"{(bundle.bundle_bytes - whole) / 1e6:+.1f}",
                f"{bundle.weight_bytes_per_token / 1e6:.1f}",
            ]
        )
    remarks = [
        "ternary linears, int4 token table and head, int8 vision encoder; every file of the bundle counted"
    ]
    return Report(f"{document.preset} on disk", [Table("sizes", "bundle sizes", rows)], remarks)
