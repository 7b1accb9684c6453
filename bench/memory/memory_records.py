"""The records of a report of `microvlm-bench memory`: one model on one backend, or several."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import MOST_COLUMNS, Estimate, Figure, Interval, ModelProvenance
from microvlm.formats.documents import Count


class RecallRow(msgspec.Struct, frozen=True):
    """Shares of right answers after so many facts were written."""

    facts: Count
    trials: Count
    memories: Count
    accuracy: Figure
    ci95: Interval
    control: Figure
    """With the memory reset; `control_gate_open`: and the scope gate open."""
    control_gate_open: Figure
    reading: Figure
    nearest_neighbour: Figure
    single: Figure | None = None
    """With all facts in one memory, where they are more than its slots."""


class OtherVendor(msgspec.Struct, frozen=True):
    """Facts asked for with another vendor's drawing."""

    facts: Count
    recall: Figure
    nearest_neighbour: Figure


class NeighbourKind(msgspec.Struct, frozen=True):
    """Questions beside a fact, whose answers should stay."""

    cases: Count
    kept: Figure
    ci95: Interval
    kept_without_gate: Figure


class Neighbours(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of neighbours' answers that stay."""

    neighbourhood: Figure
    neighbourhood_ci95: Interval | None = None
    neighbourhood_without_gate: Figure
    neighbours: dict[str, NeighbourKind]


class Crowded(Neighbours, frozen=True, kw_only=True):
    """The same beside many facts."""

    facts_written: Count


class Edit(Neighbours, frozen=True, kw_only=True):
    """One fact written, and asked for."""

    efficacy: Figure
    efficacy_ci95: Interval | None = None
    paraphrase: Figure
    paraphrase_ci95: Interval | None = None
    crowded: Crowded


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of answers after facts were forgotten; None where there was nothing to ask."""

    forgotten: Figure | None
    forgotten_ci95: Interval | None = None
    retained: Figure | None
    retained_ci95: Interval | None = None
    attack: Figure | None
    attack_ci95: Interval | None = None


class Sequential(msgspec.Struct, frozen=True):
    """Facts known after many edits one after another."""

    edits: Count
    facts: Count
    retention: Figure | None
    drift: Figure


class GateScores(msgspec.Struct, frozen=True):
    """The scope detector against one kind of question."""

    auroc: Figure | None
    eer: Figure | None


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """The scope detector against all of them, and the residual in its place."""

    kinds: dict[str, GateScores]
    auroc: Figure | None
    auroc_ci95: Interval | None = None
    eer: Figure | None
    eer_ci95: Interval | None = None
    residual_auroc: Figure | None
    residual_eer: Figure | None


class Addressing(msgspec.Struct, frozen=True):
    """How the slots were used."""

    effective_slots: Figure


class Drift(msgspec.Struct, frozen=True):
    """float32 states against float64 ones after mixed steps."""

    steps: Count
    float32_vs_float64: Figure
    without_rebuilds: Figure
    after_rebuild: Figure


class Recognition(msgspec.Struct, frozen=True):
    """Shares of positives that get their own name and of negatives that get none; weighted: their mean."""

    weighted_accuracy: Estimate
    positives: Figure
    positives_ci95: Interval
    negatives: Figure
    negatives_ci95: Interval


class ConceptRow(msgspec.Struct, frozen=True):
    """Named concepts against strangers of one kind, by the memory and by the encoder's features."""

    concepts: Count
    strangers: str
    positives: Count
    negatives: Count
    memory: Recognition
    nearest_features: Recognition
    threshold: Figure
    threshold_concepts: Count
    difference: Estimate
    """Weighted accuracy, memory minus features, paired by picture."""


class StreamRow(msgspec.Struct, frozen=True):
    """What is known after so many facts were written one after another, and what a write costs."""

    writes: Count
    live: Count
    asked: Count
    recall: Figure
    recall_ci95: Interval
    wrong: Figure
    forgotten_asked: Count
    forgotten: Figure | None
    memories: Count
    write_ms: Figure
    read_ms: Figure
    state_bytes: Count
    file_bytes: Count
    forget_ms: Figure | None = None


class Tuning(msgspec.Struct, frozen=True):
    """Facts written into the memory, or trained into the decoder."""

    facts: Count
    steps: Figure
    write_ms: Figure
    write_torch_ms: Figure
    tuning_ms: Figure
    tuning_over_write: Figure
    written: Figure | None
    written_paraphrase: Figure | None
    written_neighbourhood: Figure | None
    tuned: Figure | None
    tuned_paraphrase: Figure | None
    tuned_neighbourhood: Figure | None


class CostBar(msgspec.Struct, frozen=True):
    """A measured share of the time; `met` is None where nothing is demanded of this size."""

    name: str
    at_most: Figure
    value: Figure
    met: bool | None


class CostSize(msgspec.Struct, frozen=True):
    """The same shares of counted multiplications, of one configuration."""

    name: str
    predicted_read_write_share_of_answer: Figure
    predicted_encode_share_of_prefill: Figure


class Costs(msgspec.Struct, frozen=True):
    """Bars of reading with writing, and of encoding, in this order."""

    bars: tuple[CostBar, CostBar]
    sizes: list[CostSize]

    def __post_init__(self) -> None:
        if [bar.name for bar in self.bars] != ["read_write_share_of_answer", "encode_share_of_prefill"]:
            raise ValueError("bars must be read_write_share_of_answer and encode_share_of_prefill")


class OpenValueRow(msgspec.Struct, frozen=True, kw_only=True):
    """Facts with values that no training saw, asked for in one way."""

    facts: Count
    asked: str
    trials: Count
    right: Figure
    right_ci95: Interval
    wrong: Figure
    wrong_ci95: Interval
    not_found: Figure
    nearest_key: Figure
    decoder: Figure


class StrangerRow(msgspec.Struct, frozen=True):
    """Pictures never told of, under the question of all facts: the shares that get a text."""

    facts: Count
    strangers: Count
    let_in: Figure
    let_in_ci95: Interval
    nearest_key: Figure
    decoder: Figure


class LengthRow(msgspec.Struct, frozen=True):
    """Values of some length that the decoder says exactly."""

    tokens: str
    values: Count
    exact: Figure
    exact_ci95: Interval


class OpenValues(msgspec.Struct, frozen=True):
    """Facts with any values."""

    rows: list[OpenValueRow]
    strangers: list[StrangerRow]
    decoder_by_length: list[LengthRow]


class Scores(msgspec.Struct, frozen=True):
    """Every table that is a share of right answers; all or none of a report's part."""

    chance: Figure
    recall: list[RecallRow]
    other_vendor: OtherVendor
    edit: Edit
    forget: Forget
    sequential: Sequential
    gate: Gate
    addressing: Addressing
    drift: Drift


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one backend: costs, and scores unless the costs alone were measured."""

    label: str
    slots: Count
    backend: str
    latency_ms: dict[str, Figure]
    costs: Costs
    provenance: ModelProvenance
    chance: Figure | None = None
    recall: list[RecallRow] | None = None
    other_vendor: OtherVendor | None = None
    edit: Edit | None = None
    forget: Forget | None = None
    sequential: Sequential | None = None
    gate: Gate | None = None
    addressing: Addressing | None = None
    drift: Drift | None = None
    tuning: Tuning | None = None
    open_values: OpenValues | None = None
    concepts: list[ConceptRow] = []
    stream: list[StreamRow] = []

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in Scores.__struct_fields__}
        missing = [name for name, value in values.items() if value is None]
        if 0 < len(missing) < len(values):
            raise ValueError(f"{', '.join(missing)} missing beside other scores")

    @property
    def scores(self) -> Scores | None:
        """None where the costs alone were measured."""
        if self.recall is None:
            return None
        return Scores(**{name: getattr(self, name) for name in Scores.__struct_fields__})


class SeveralParts(msgspec.Struct, frozen=True):
    """The whole document of several models or backends."""

    subjects: Annotated[list[Part], Meta(min_length=1, max_length=MOST_COLUMNS)]
    provenance: ModelProvenance
