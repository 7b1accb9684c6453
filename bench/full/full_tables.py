"""The documents of `microvlm-bench full` and `sizes` as tables. Reads JSON, measures nothing."""

from __future__ import annotations

from typing import Any

from microvlm.bench.tables import Report, Table


def report(document: dict[str, Any]) -> Report:
    full, facts = document["full"], document["provenance"]
    streams = ", ".join(f"{value:.1f} GB/s" for value in facts["stream_gb_per_s"].values())
    head = f"{facts['model']['name']}: decoder on ONNX Runtime, {full['kernels']}; memory read at {streams}"
    rows = [
        ["", "value"],
        [f"prefill of {full['prompt_tokens']}, tokens/s", f"{full['prefill_tokens_per_s']:.1f}"],
        ["decode, tokens/s", f"{full['decode_tokens_per_s']:.1f}"],
        ["weights of a token, MB", f"{full['weight_bytes_per_token'] / 1e6:.1f}"],
        ["decode, GB/s of weights", f"{full['decode_gb_per_s']:.1f}"],
        ["share of the streaming roofline", f"{full['decode_roofline_share']:.0%}"],
        ["anonymous memory of the model, MB", _megabytes(full["anonymous_of_model_bytes"])],
        ["of the tokenizer, apart, MB", _megabytes(full["tokenizer_anonymous_bytes"])],
        ["file-backed memory, MB", _megabytes(full["file_backed_bytes"])],
        ["load, ms", f"{full['load_ms']:.0f}"],
    ]
    bar_rows = [["bar", "value", "demanded", "met"]]
    for bar in document["bars"]:
        demanded = f"<= {bar['at_most']:,}" if "at_most" in bar else f">= {bar['at_least']:.1f}"
        verdict = {True: "yes", False: "NO", None: "-"}[bar["met"]]
        bar_rows.append(
            [bar["name"], f"{bar['value']:,}" if bar["value"] is not None else "-", demanded, verdict]
        )
    remarks = ["speeds are demanded in proportion to what one thread reads here: 15 GB/s is the measure"]
    return Report(
        head, [Table("decoder", "full-size decoder", rows), Table("bars", "bars", bar_rows)], remarks
    )


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"


def sizes_report(document: dict[str, Any]) -> Report:
    """The document as one table; each row also says what it saves against the first."""
    whole = document["bundles"][0]["bundle_bytes"]
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
    for bundle in document["bundles"]:
        rows.append(
            [
                bundle["packing"],
                f"{bundle['vocabulary']:,}",
                str(bundle["layers"]),
                str(bundle["slots"]),
                f"{bundle['bundle_bytes'] / 1e6:.1f}",
                f"{(bundle['bundle_bytes'] - whole) / 1e6:+.1f}",
                f"{bundle['weight_bytes_per_token'] / 1e6:.1f}",
            ]
        )
    remarks = [
        "ternary linears, int4 token table and head, int8 vision encoder; every file of the bundle counted"
    ]
    return Report(f"{document['preset']} on disk", [Table("sizes", "bundle sizes", rows)], remarks)
