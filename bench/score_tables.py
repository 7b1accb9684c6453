"""The document of `microvlm-score` as tables. Reads JSON, scores nothing."""

from __future__ import annotations

from typing import Any

from microvlm.bench.tables import Report, Rows, Table

BASELINES = (("pixels_24", "raw pixels"), ("efficientnet_lite0", "EfficientNet-Lite0's features"))
"""Fields of the document's `baselines`, and their names for readers: nearest class means."""
VENDORS = (("captions", "emojione", "test vendor"), ("captions_stress", "openmoji", "stress vendor"))
"""(field of a score, field of a baseline, name for readers)."""


def report(document: dict[str, Any]) -> Report:
    scores = [document, *([document["against"]] if "against" in document else [])]
    heads = [str(score["model"]) for score in scores]
    tables = [
        Table("captions", "captions, exact match", _captions(document, scores, heads)),
        Table("scenes", "scene questions", _scenes(scores, heads)),
        Table("episodes", "episodes: what an earlier image was", _episodes(scores, heads)),
    ]
    remarks = [f"{document['captions']['count']} emoji, drawn by vendors that training never saw"]
    difference = document.get("against", {}).get("caption_difference")
    if difference:
        remarks.append(
            f"captions, paired: {heads[0]} minus {heads[1]} {difference['difference']:+.3f} "
            f"[{difference['ci95_low']:+.3f}, {difference['ci95_high']:+.3f}]"
        )
    return Report(f"scores of {heads[0]}", tables, remarks)


def _captions(document: dict[str, Any], scores: list[dict[str, Any]], heads: list[str]) -> Rows:
    baselines = document.get("baselines", {})
    columns = [(field, name) for field, name in BASELINES if field in baselines]
    rows = [["", *heads, *(f"nearest class mean of {name}" for _, name in columns)]]
    for field, vendor, name in VENDORS:
        shares = [score[field]["exact_match"] for score in scores]
        shares += [baselines[baseline][vendor] for baseline, _ in columns]
        rows.append([name, *(f"{share:.3f}" for share in shares)])
    return rows


def _scenes(scores: list[dict[str, Any]], heads: list[str]) -> Rows:
    rows = [
        ["question", "samples", *heads, "majority answer", *(f"both twins right, {head}" for head in heads)]
    ]
    for kind, row in scores[0]["scenes"].items():
        scenes = [score["scenes"][kind] for score in scores]
        accuracies = [f"{scene['accuracy']:.3f}" for scene in scenes]
        twins = [f"{scene['twins']:.3f}" if "twins" in scene else "" for scene in scenes]
        rows.append([kind, str(row["count"]), *accuracies, f"{row['majority']:.3f}", *twins])
    return rows


def _episodes(scores: list[dict[str, Any]], heads: list[str]) -> Rows:
    rows = [["images", "questions", *heads, "empty memory"]]
    for length, row in scores[0]["episodes"].items():
        shares = [f"{score['episodes'][length]['accuracy']:.3f}" for score in scores]
        rows.append([length, str(row["count"]), *shares, f"{row['memory_off']:.3f}"])
    return rows
