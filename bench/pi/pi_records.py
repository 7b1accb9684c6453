"""The records of reports about boards: `microvlm-bench pi`, `nox -s pi-fit`, and baselines of instruction counts."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.equivalence.equivalence_records import Replay
from microvlm.bench.pi.profile_records import Cpu, Profile
from microvlm.bench.records import Bar, Figure, Interval, ModelProvenance, Provenance
from microvlm.formats.documents import Count

OURS = "ours-2bit"


class CostRow(msgspec.Struct, frozen=True):
    """Counted instructions and bytes of one phase."""

    phase: str
    instructions: Count
    simd: Count
    kernel_instructions: Count
    weight_bytes: Count
    predicted_timings_kernel_cycles: Count | None = None
    predicted_mca_kernel_cycles: Count | None = None


class CountedOn(msgspec.Struct, frozen=True):
    """The emulated machine."""

    cpu: str
    llvm_mca: str | None = None


class PredictedTime(msgspec.Struct, frozen=True):
    """Milliseconds at both ends of the bandwidth."""

    phase: str
    low: Figure
    high: Figure


class MeasuredTime(msgspec.Struct, frozen=True):
    """Milliseconds on a board."""

    phase: str
    median_ms: Figure
    p90_ms: Figure


class Peer(msgspec.Struct, frozen=True):
    """One token at full size by one contender."""

    contender: str
    instructions_per_token: Annotated[int, Meta(ge=1, le=2**53)]
    weight_bytes_per_token: Count


class ResidentMemory(msgspec.Struct, frozen=True):
    """Resident memory of one process or of several, each field at its largest."""

    rss_bytes: Count
    anonymous_bytes: Count
    file_backed_bytes: Count
    peak_rss_bytes: Count | None = None
    """Of one process, as the kernel keeps it."""
    pss_bytes: Count | None = None
    """Of several: pages that they share count once."""


class ServeMemory(msgspec.Struct, frozen=True):
    """The two processes of `microvlm serve`; `together` at one moment, by samples."""

    server: ResidentMemory
    worker: ResidentMemory
    together: ResidentMemory


class ServedAnswer(msgspec.Struct, frozen=True):
    """What a request to the server got."""

    request: str
    answer: str
    source: str


class FitRun(msgspec.Struct, frozen=True):
    """One program on an emulated board."""

    model: str
    program: str
    ram_bytes: Count
    peak_rss_bytes: Count
    available_bytes: Count
    oom: bool
    memory: ServeMemory | None = None
    """Of `serve`."""
    answers: list[ServedAnswer] = []


class Fit(msgspec.Struct, frozen=True):
    """Whether programs fit a board's memory."""

    runs: list[FitRun]


class FitReport(msgspec.Struct, frozen=True):
    """The whole document of `nox -s pi-fit`."""

    fit: Fit
    provenance: Provenance


class Equivalence(msgspec.Struct, frozen=True):
    """The device against a backend of this machine."""

    verdict: str
    replay: Replay


class TwoEquivalences(Equivalence, frozen=True, kw_only=True):
    """The device against torch, and against ort."""

    against_ort: Equivalence


class PublishedSpeed(msgspec.Struct, frozen=True):
    """A published speed and what the model of the predictions gives for it."""

    name: str
    source: str
    published_tokens_per_s: Interval
    predicted_tokens_per_s: Figure
    error: Figure


class PredictionModel(msgspec.Struct, frozen=True):
    """The anchors that the model was fitted to, and the one that tests it."""

    anchors: list[PublishedSpeed]
    held_out: PublishedSpeed


class PiReport(msgspec.Struct, frozen=True):
    """The whole document of `pi`: the parts that were run."""

    target: str
    profile: Profile
    model: PredictionModel
    provenance: ModelProvenance
    equivalence: TwoEquivalences | None = None
    cost: list[CostRow] | None = None
    counted_on: CountedOn | None = None
    predicted_ms: list[PredictedTime] | None = None
    predicted_timings_ms: list[PredictedTime] | None = None
    predicted_mca_ms: list[PredictedTime] | None = None
    measured_ms: list[MeasuredTime] | None = None
    peers: list[Peer] | None = None
    bars: list[Bar] = []
    fit: Fit | None = None

    def __post_init__(self) -> None:
        if self.cost is not None and self.counted_on is None:
            raise ValueError("counted_on is missing beside cost")
        tables = [self.predicted_timings_ms, self.predicted_mca_ms]
        by_table = [[time.phase for time in times] for times in tables if times is not None]
        if any(phases != by_table[0] for phases in by_table):
            raise ValueError("predicted_timings_ms and predicted_mca_ms must be of the same phases")
        if self.peers is not None and OURS not in [peer.contender for peer in self.peers]:
            raise ValueError(f"peers lack {OURS}, which the others are compared with")


class PhaseCounts(msgspec.Struct, frozen=True):
    """Instructions of one phase; `others` are those outside of the native library."""

    instructions: Count
    simd: Count
    others: Count

    def __post_init__(self) -> None:
        if max(self.simd, self.others) > self.instructions:
            raise ValueError("simd and others must not be more than instructions")


class CountKey(msgspec.Struct, frozen=True):
    """All that counts depend on, except our own code."""

    graphs: str
    cpu: Cpu
    onnxruntime: str
    numpy: str
    python: str
    system: str
    compiler: str


class CountReport(msgspec.Struct, frozen=True):
    """A committed baseline."""

    model: str
    key: CountKey
    phases: dict[str, PhaseCounts]
