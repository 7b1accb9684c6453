"""Two loaded models over the same samples: free-running, teacher-forced and replayed. Measures; `verdict` decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from microvlm.bench.equivalence.metrics import Agreement, Drift, Metrics
from microvlm.bench.equivalence.recorded_activations import Comparison, Tape
from microvlm.bench.equivalence.replay import Instrument
from microvlm.bench.equivalence.samples import EPISODE, EpisodeScript, Sample
from microvlm.bench.equivalence.transcripts import Answer, answer, forced_logits, make_prompt, play
from microvlm.inputs.processor import Processor
from microvlm.runtime import Runtime

Progress = Callable[[str], None]
Instruments = tuple[Instrument, Instrument]
"""The recording one and the replaying one."""


@dataclass(frozen=True)
class Subject:
    """One model on one backend."""

    label: str
    runtime: Runtime
    instrument: Instrument | None
    """None where its layers can't be opened, or must not be."""
    closed: str = "its layers cannot be opened"
    """Why `instrument` is None."""


@dataclass(frozen=True)
class Pair:
    reference: Subject
    candidate: Subject
    processor: Processor
    limit: int
    """Most tokens of an answer."""

    def opened(self) -> Instruments | str:
        """Both instruments, or why nothing can be replayed."""
        for subject in (self.reference, self.candidate):
            if subject.instrument is None:
                return f"{subject.label}: {subject.closed}, so nothing can be replayed"
        first, second = self.reference.instrument, self.candidate.instrument
        assert first is not None
        assert second is not None
        only = first.layers ^ second.layers
        if only:
            return f"the two do not quantise the same layers ({min(only)}), so nothing can be replayed"
        return first, second


def compare(
    pair: Pair, samples: Sequence[Sample], episode: EpisodeScript, progress: Progress = lambda _: None
) -> Metrics:
    """Every figure of the equivalence report. `progress` gets a line now and then."""
    opened = pair.opened()
    if isinstance(opened, str):
        metrics, instruments = Metrics(replay_unavailable=opened), None
    else:
        metrics, instruments = Metrics(replayed=Agreement(), comparison=Comparison()), opened
    for index, sample in enumerate(samples):
        _compare_sample(pair, instruments, sample, metrics)
        if (index + 1) % 25 == 0:
            progress(f"{index + 1} of {len(samples)} samples, {metrics.free.equal} answered alike")
    progress(f"an episode of {len(episode.images)} images")
    _compare_episode(pair, instruments, episode, metrics)
    return metrics


def _compare_sample(pair: Pair, instruments: Instruments | None, sample: Sample, metrics: Metrics) -> None:
    def run(runtime: Runtime, follow: Sequence[int] | None = None) -> Answer:
        prompt = make_prompt(runtime, pair.processor, sample.prompt, sample.images)
        return answer(runtime, pair.processor, prompt, pair.limit, None, follow)

    reference_prompt, candidate_prompt = (
        make_prompt(subject.runtime, pair.processor, sample.prompt, sample.images)
        for subject in (pair.reference, pair.candidate)
    )
    theirs = answer(pair.candidate.runtime, pair.processor, candidate_prompt, pair.limit)
    if instruments is None or metrics.replayed is None or metrics.comparison is None:
        ours = answer(pair.reference.runtime, pair.processor, reference_prompt, pair.limit)
    else:
        recorder, replayer = instruments
        tape = Tape()
        with recorder.recording(tape):
            ours = run(recorder.runtime)
        with replayer.replaying(tape, metrics.comparison):
            replayed = run(replayer.runtime, ours.choices)
        metrics.replayed.add_answers(sample.name, ours, replayed)
        metrics.replayed.add_logits(ours.logits, replayed.logits)
    metrics.free.add_answers(sample.name, ours, theirs)
    metrics.free.add_logits(
        forced_logits(pair.reference.runtime, reference_prompt, ours.choices),
        forced_logits(pair.candidate.runtime, candidate_prompt, ours.choices),
    )
    metrics.scores.add(sample.kind, sample.answer, ours, theirs)


def _compare_episode(
    pair: Pair, instruments: Instruments | None, script: EpisodeScript, metrics: Metrics
) -> None:
    theirs = play(pair.candidate.runtime, pair.processor, script, pair.limit)
    if instruments is None or metrics.replayed is None or metrics.comparison is None:
        ours = play(pair.reference.runtime, pair.processor, script, pair.limit)
    else:
        recorder, replayer = instruments
        tape = Tape()
        with recorder.recording(tape):
            ours = play(recorder.runtime, pair.processor, script, pair.limit)
        with replayer.replaying(tape, metrics.comparison):
            replayed = play(replayer.runtime, pair.processor, script, pair.limit, ours.answers)
        metrics.replayed_drift = Drift.between(ours, replayed)
        for question, first, second in zip(script.questions, ours.answers, replayed.answers, strict=True):
            metrics.replayed.add_answers(question, first, second)
            metrics.replayed.add_logits(first.logits, second.logits)
    metrics.drift = Drift.between(ours, theirs)
    answers = zip(script.questions, script.answers, ours.answers, theirs.answers, strict=True)
    for question, right, first, second in answers:
        metrics.free.add_answers(question, first, second)
        metrics.scores.add(EPISODE, right, first, second)
        reference_logits, candidate_logits = (
            forced_logits(
                subject.runtime,
                make_prompt(subject.runtime, pair.processor, question, []),
                first.choices,
                trace.states[-1],
            )
            for subject, trace in ((pair.reference, ours), (pair.candidate, theirs))
        )
        metrics.free.add_logits(reference_logits, candidate_logits)
