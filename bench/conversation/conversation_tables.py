"""The document of `conversation` as tables. Reads JSON, measures nothing."""

from __future__ import annotations

from microvlm.bench.conversation.conversation_records import ConversationReport, Limit, Stage
from microvlm.bench.tables import Report, Table

MB = 1e6
_SHOWN = 5
"""Stages of a long conversation that are shown, from the first to the last, or one more."""


def report(record: ConversationReport) -> Report:
    """Stages side by side, and the bars."""
    head = (
        f"a conversation of {record.turns} turns with {record.provenance.model.name} on {record.backend}, "
        "saved after each"
    )
    tables = [
        Table("conversation", "a turn, and the process after it", _stages(record.stages)),
        Table("bars", "bars", _bars(record.bars)),
    ]
    probe = record.probe_after_loading
    remarks = [
        f"the file is loaded in {record.load_s:.2f} s; the probe's answer then: '{probe.answer}', scope "
        f"{probe.scope:.3f}"
    ]
    return Report(head, tables, remarks)


def _stages(stages: list[Stage]) -> list[list[str]]:
    step = max(1, (len(stages) - 1) // (_SHOWN - 1))
    shown = sorted({*range(0, len(stages), step), len(stages) - 1})
    rows = [
        [
            *("turns", "facts", "memories", "RSS, MB", "RSS above the facts, MB", "descriptors"),
            *("file, MB", "written a turn, bytes", "a turn, ms", "probe", "scope"),
        ]
    ]
    for stage in (stages[number] for number in shown):
        rows.append(
            [
                *map(str, (stage.turns, stage.facts, stage.states)),
                *(f"{value / MB:.1f}" for value in (stage.rss_bytes, stage.rss_bytes - stage.fact_bytes)),
                str(stage.descriptors),
                f"{stage.file_bytes / MB:.1f}",
                *(f"{value:.0f}" for value in (stage.written_bytes_per_turn, stage.ms_per_turn)),
                stage.probe.answer,
                f"{stage.probe.scope:.3f}",
            ]
        )
    return rows


def _bars(bars: list[Limit]) -> list[list[str]]:
    rows = [["", "value", "at most", "met"]]
    for bar in bars:
        rows.append([bar.name, f"{bar.value:g}", f"{bar.at_most:g}", "yes" if bar.met else "no"])
    return rows
