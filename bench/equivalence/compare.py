"""Runs two loaded models over the same samples: free-running, teacher-forced and replayed. `verdict` judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from microvlm.bench.equivalence.metrics import Agreement, Drift, Example, Metrics
from microvlm.bench.equivalence.samples import CAPTION, EPISODE, EpisodeScript, Sample
from microvlm.bench.equivalence.transcripts import Answer, answer, forced_logits, make_prompt, play
from microvlm.errors import UserError
from microvlm.exporters.replay.differences import Differences
from microvlm.exporters.replay.recording import Diverged, Recorder, Recording, Replayer
from microvlm.inputs.processor import Processor
from microvlm.runtime import Instrumented, Runtime

Progress = Callable[[str], None]
EXAMPLES = 12
"""Captions that a report shows."""


@dataclass(frozen=True)
class ModelUnderTest:
    """One model on one backend."""

    label: str
    runtime: Runtime
    not_replayed: str | None = None
    """A clause: why its layers must not be recorded or replayed, whatever its runtime can do."""


@dataclass(frozen=True)
class Pair:
    """The two models that are compared."""

    reference: ModelUnderTest
    candidate: ModelUnderTest
    processor: Processor
    limit: int
    """Most tokens of an answer."""

    def instruments(self) -> Instruments | str:
        """Both runtimes as instruments, or a clause: why nothing can be replayed."""
        layers = []
        for model in (self.reference, self.candidate):
            closed = model.not_replayed
            if closed is None and not isinstance(model.runtime, Instrumented):
                closed = "its layers cannot be opened"
            if closed is None:
                try:
                    layers.append(model.runtime.quantized_layers())  # type: ignore[attr-defined]
                except UserError as error:
                    closed = str(error)
            if closed is not None:
                return f"{model.label}: {closed}, so nothing can be replayed"
        only = layers[0] ^ layers[1]
        if only:
            return f"the two do not quantise the same layers ({min(only)}), so nothing can be replayed"
        return Instruments(self.reference.runtime, self.candidate.runtime)  # type: ignore[arg-type]


@dataclass
class Instruments:
    """Records the reference and replays the candidate, one recording after another."""

    reference: Instrumented
    candidate: Instrumented
    differences: Differences = field(default_factory=Differences)
    """Counts over all recordings."""
    _recording: Recording = field(default_factory=Recording)

    def recording(self) -> AbstractContextManager[None]:
        """A context: the reference's layers are recorded anew."""
        self._recording = Recording()
        return self.reference.listening(Recorder(self._recording))

    def replaying(self) -> AbstractContextManager[None]:
        """A context: the candidate's layers use what was recorded last. Calls raise Diverged."""
        return self.candidate.listening(Replayer(self._recording, self.differences))


def compare(
    pair: Pair, samples: Sequence[Sample], episode: EpisodeScript, progress: Progress = lambda _: None
) -> Metrics:
    """Every figure of the equivalence report. `progress` gets a line now and then."""
    instruments = pair.instruments()
    if isinstance(instruments, Instruments):
        try:
            return _compare(pair, instruments, samples, episode, progress)
        except Diverged as clause:
            progress(f"the replay failed ({clause}): once more without it")
            reason = f"{pair.candidate.label} did not follow the recording: {clause}"
            return _compare(pair, reason, samples, episode, progress)
    return _compare(pair, instruments, samples, episode, progress)


def _compare(
    pair: Pair,
    instruments: Instruments | str,
    samples: Sequence[Sample],
    episode: EpisodeScript,
    progress: Progress,
) -> Metrics:
    if isinstance(instruments, str):
        metrics = Metrics(replay_unavailable=instruments)
    else:
        metrics = Metrics(replayed=Agreement(), differences=instruments.differences)
    for index, sample in enumerate(samples):
        _compare_sample(pair, instruments, sample, metrics)
        if (index + 1) % 25 == 0:
            progress(f"{index + 1} of {len(samples)} samples, {metrics.free.equal} answered alike")
    progress(f"an episode of {len(episode.images)} images")
    _compare_episode(pair, instruments, episode, metrics)
    return metrics


def _compare_sample(pair: Pair, instruments: Instruments | str, sample: Sample, metrics: Metrics) -> None:
    def prompted_answer(runtime: Runtime, follow: Sequence[int] | None = None) -> Answer:
        prompt = make_prompt(runtime, pair.processor, sample.prompt, sample.images)
        return answer(runtime, pair.processor, prompt, pair.limit, None, follow)

    reference, candidate = pair.reference.runtime, pair.candidate.runtime
    reference_prompt, candidate_prompt = (
        make_prompt(runtime, pair.processor, sample.prompt, sample.images)
        for runtime in (reference, candidate)
    )
    theirs = answer(candidate, pair.processor, candidate_prompt, pair.limit)
    if isinstance(instruments, str) or metrics.replayed is None:
        ours = answer(reference, pair.processor, reference_prompt, pair.limit)
    else:
        with instruments.recording():
            ours = prompted_answer(reference)
        with instruments.replaying():
            replayed = prompted_answer(candidate, ours.choices)
        metrics.replayed.add_answers(sample.name, ours, replayed)
        metrics.replayed.add_logits(ours.logits, replayed.logits)
    metrics.free.add_answers(sample.name, ours, theirs)
    metrics.free.add_logits(
        forced_logits(reference, reference_prompt, ours.choices),
        forced_logits(candidate, candidate_prompt, ours.choices),
    )
    metrics.scores.add(sample.kind, sample.answer, ours, theirs)
    if sample.kind == CAPTION and len(metrics.examples) < EXAMPLES:
        metrics.examples.append(Example(sample.name, sample.prompt, sample.answer, ours.text, theirs.text))


def _compare_episode(
    pair: Pair, instruments: Instruments | str, script: EpisodeScript, metrics: Metrics
) -> None:
    reference, candidate = pair.reference.runtime, pair.candidate.runtime
    theirs = play(candidate, pair.processor, script, pair.limit)
    if isinstance(instruments, str) or metrics.replayed is None:
        ours = play(reference, pair.processor, script, pair.limit)
    else:
        with instruments.recording():
            ours = play(reference, pair.processor, script, pair.limit)
        with instruments.replaying():
            replayed = play(candidate, pair.processor, script, pair.limit, ours.answers)
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
                runtime,
                make_prompt(runtime, pair.processor, question, []),
                first.choices,
                trace.states[-1],
            )
            for runtime, trace in ((reference, ours), (candidate, theirs))
        )
        metrics.free.add_logits(reference_logits, candidate_logits)
