"""The document of `microvlm-bench pi` as tables. Reads JSON, measures nothing."""

from __future__ import annotations

from typing import Any

from microvlm.bench.pi.counting import peer_counts
from microvlm.bench.tables import Report, Table


def report(document: dict[str, Any]) -> Report:
    profile = document["profile"]
    state = "calibrated" if profile["calibrated"] else "uncalibrated"
    model = document["provenance"]["model"]["name"]
    head = f"{model} on {document['target']}; predictions for {profile['name']}, {state}"
    parts = (_equivalence, _cost, _predicted, _measured, _peers, _bars, _fit)
    tables = [table for table in (part(document) for part in parts) if table is not None]
    tables += [_profile(profile), _model(document["model"])]
    remarks = [
        "counted: on an emulated CPU, one thread; predicted: from counts, bytes and the profile, a factor of 2 either "
        "way until somebody calibrates; nothing here was measured on a board unless it says so"
    ]
    counted = document.get("counted_on", {}).get("cpu", profile["cpu"])
    if counted != profile["cpu"]:
        remarks.append(
            f"the counts are of a {counted}, which runs other kernels than {profile['name']}'s {profile['cpu']}: leave "
            "--target away, or name that core"
        )
    return Report(head, tables, remarks)


def _cost(document: dict[str, Any]) -> Table | None:
    if "cost" not in document:
        return None
    rows = [["phase", "instructions, M", "of them SIMD, M", "in our kernels, M", "weights, MB"]]
    for row in document["cost"]:
        rows.append(
            [
                row["phase"],
                f"{row['instructions'] / 1e6:.2f}",
                f"{row['simd'] / 1e6:.2f}",
                f"{row['kernel_instructions'] / 1e6:.2f}",
                f"{row['weight_bytes'] / 1e6:.2f}",
            ]
        )
    title = f"instructions counted on an emulated {document['counted_on']['cpu']}"
    return Table("counts", title, rows)


def _predicted(document: dict[str, Any]) -> Table | None:
    if "predicted_ms" not in document:
        return None
    numbers = document["profile"]["numbers"]
    low, high = (numbers[f"bandwidth_{end}_bytes_per_s"]["value"] / 1e9 for end in ("low", "high"))
    rows = [["phase", f"at {low:.2g} GB/s", f"at {high:.2g} GB/s"]]
    rows += [[row["phase"], f"{row['high']:.1f}", f"{row['low']:.1f}"] for row in document["predicted_ms"]]
    return Table("predicted", "predicted, ms", rows)


def _measured(document: dict[str, Any]) -> Table | None:
    if "measured_ms" not in document:
        return None
    rows = [["phase", "median", "p90"]]
    rows += [
        [row["phase"], f"{row['median_ms']:.1f}", f"{row['p90_ms']:.1f}"] for row in document["measured_ms"]
    ]
    return Table("measured", "measured, ms", rows)


def _peers(document: dict[str, Any]) -> Table | None:
    if "peers" not in document:
        return None
    rows = [["one token, full size", "instructions, M", "weights, MB", "times ours-2bit"]]
    tokens = {row["contender"]: row["instructions_per_token"] for row in document["peers"]}
    ours = tokens["ours-2bit"]
    for row in document["peers"]:
        rows.append(
            [
                row["contender"],
                f"{row['instructions_per_token'] / 1e6:.1f}",
                f"{row['weight_bytes_per_token'] / 1e6:.1f}",
                f"{row['instructions_per_token'] / ours:.2f}",
            ]
        )
    title = f"ONNX Runtime's own paths, {peer_counts.LAYERS} layers and a head of {peer_counts.VOCABULARY:,}"
    return Table("peers", title, rows)


def _bars(document: dict[str, Any]) -> Table | None:
    if not document.get("bars"):
        return None
    rows = [["bar", "value", "demanded", "met"]]
    for bar in document["bars"]:
        demanded = f"<= {bar['at_most']:,}" if "at_most" in bar else f">= {bar['at_least']:,}"
        rows.append([bar["name"], f"{bar['value']:,}", demanded, "yes" if bar["met"] else "NO"])
    return Table("bars", "bars", rows)


def _fit(document: dict[str, Any]) -> Table | None:
    if not document.get("fit"):
        return None
    return fit_table(document["fit"])


def fit_table(fit: dict[str, Any]) -> Table:
    """A row for each run of a `measure_fit` document; MB of 10^6 bytes, memory of the board in MiB."""
    rows = [["model", "program", "board's memory, MiB", "peak RSS, MB", "left, MB", "out of memory"]]
    for run in fit["runs"]:
        megabytes = (f"{run[name] / 1e6:.1f}" for name in ("peak_rss_bytes", "available_bytes"))
        oom = "yes" if run["oom"] else "no"
        rows.append([run["model"], run["program"], f"{run['ram_bytes'] / (1 << 20):.0f}", *megabytes, oom])
    return Table("fit", "whole programs on an emulated board", rows)


def fit_report(document: dict[str, Any]) -> Report:
    """The document of `nox -s pi-fit`."""
    remarks = ["peaks and the OOM killer are those of the emulated board's kernel; its times mean nothing"]
    return Report("does a model fit a board?", [fit_table(document["fit"])], remarks)


def _equivalence(document: dict[str, Any]) -> Table | None:
    if "equivalence" not in document:
        return None
    compared = document["equivalence"]
    rows = [
        ["ort-arm64 against", "verdict", "integer sums equal", "codes at a tie", "replayed logits differ by"]
    ]
    for name, part in (("torch", compared), ("ort", compared["against_ort"])):
        replay = part["replay"]
        rows.append(
            [
                name,
                part["verdict"],
                "-"
                if replay["codes"] is None
                else f"{replay['sums'] - replay['sums_differing']:,} of {replay['sums']:,}",
                "-" if replay["codes"] is None else f"{replay['codes_differing']:,} of {replay['codes']:,}",
                "-" if replay["codes"] is None else f"{replay['logits_max_abs_diff']:.1e}",
            ]
        )
    return Table("equivalence", "equivalence", rows)


def _profile(profile: dict[str, Any]) -> Table:
    """An assumption is one in the table too, not only in the file."""
    rows = [["number", "value", "it is", "source"]]
    rows += [
        [name, f"{entry['value']:g}", entry["basis"], entry["source"]]
        for name, entry in profile["numbers"].items()
    ]
    return Table("profile", f"{profile['name']}, as the predictions take it", rows)


def _model(model: dict[str, Any]) -> Table:
    rows = [["published, tokens/s", "reported", "by the model", "error", "source"]]
    labelled = [("fitted", anchor) for anchor in model["anchors"]] + [("not fitted", model["held_out"])]
    for label, anchor in labelled:
        low, high = anchor["published_tokens_per_s"]
        reported = f"{low:g}" if low == high else f"{low:g}-{high:g}"
        rows.append(
            [
                f"{anchor['name']} ({label})",
                reported,
                f"{anchor['predicted_tokens_per_s']:.2f}",
                f"{anchor['error']:+.0%}",
                anchor["source"],
            ]
        )
    return Table("model", "the model behind the predictions", rows)
