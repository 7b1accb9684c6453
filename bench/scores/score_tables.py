"""The report of `microvlm-score` as tables. Scores nothing."""

from __future__ import annotations

from collections.abc import Sequence

from microvlm.bench.scores.score_records import Baseline, Score, ScoreReport
from microvlm.bench.tables import Report, Rows, Table


def report(document: ScoreReport) -> Report:
    scores: list[Score] = [document, *([document.against] if document.against is not None else [])]
    heads = [score.model for score in scores]
    tables = [
        Table("captions", "captions, exact match", _captions(document, scores, heads)),
        Table("scenes", "scene questions", _scenes(scores, heads)),
        Table("episodes", "episodes: what an earlier image was", _episodes(scores, heads)),
    ]
    remarks = [f"{document.captions.count} emoji, drawn by vendors that training never saw"]
    difference = None if document.against is None else document.against.caption_difference
    if difference is not None:
        remarks.append(
            f"captions, paired: {heads[0]} minus {heads[1]} {difference.difference:+.3f} "
            f"[{difference.ci95_low:+.3f}, {difference.ci95_high:+.3f}]"
        )
    return Report(f"scores of {heads[0]}", tables, remarks)


def _captions(document: ScoreReport, scores: Sequence[Score], heads: Sequence[str]) -> Rows:
    named: list[tuple[str, Baseline | None]] = [
        ("raw pixels", document.baselines.pixels_24),
        ("EfficientNet-Lite0's features", document.baselines.efficientnet_lite0),
    ]
    baselines = [(name, baseline) for name, baseline in named if baseline is not None]
    rows = [["", *heads, *(f"nearest class mean of {name}" for name, _ in baselines)]]
    for vendor, shares in (
        (
            "test vendor",
            [score.captions.exact_match for score in scores]
            + [baseline.emojione for _, baseline in baselines],
        ),
        (
            "stress vendor",
            [score.captions_stress.exact_match for score in scores]
            + [baseline.openmoji for _, baseline in baselines],
        ),
    ):
        rows.append([vendor, *(f"{share:.3f}" for share in shares)])
    return rows


def _scenes(scores: Sequence[Score], heads: Sequence[str]) -> Rows:
    rows = [
        ["question", "samples", *heads, "majority answer", *(f"both twins right, {head}" for head in heads)]
    ]
    for kind, row in scores[0].scenes.items():
        scenes = [score.scenes[kind] for score in scores]
        accuracies = [f"{scene.accuracy:.3f}" for scene in scenes]
        twins = ["" if scene.twins is None else f"{scene.twins:.3f}" for scene in scenes]
        rows.append([kind, str(row.count), *accuracies, f"{row.majority:.3f}", *twins])
    return rows


def _episodes(scores: Sequence[Score], heads: Sequence[str]) -> Rows:
    rows = [["images", "questions", *heads, "empty memory"]]
    for length, row in scores[0].episodes.items():
        shares = [f"{score.episodes[length].accuracy:.3f}" for score in scores]
        rows.append([length, str(row.count), *shares, f"{row.memory_off:.3f}"])
    return rows
