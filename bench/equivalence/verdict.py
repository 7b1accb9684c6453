"""Judges the figures of a comparison. Each threshold carries its argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from microvlm.bench.equivalence.metrics import Agreement, Metrics
from microvlm.bench.stats import Interval
from microvlm.exporters.replay.differences import TIE_DISTANCE, TIE_STEP

PASS, AMBIGUOUS, FAIL = "PASS", "AMBIGUOUS", "FAIL"

LOGITS = 1e-4
"""Largest difference of logits with equal int8 activations, where only the order of float32 sums differs: 1e-5 on a
trained nano; one wrong activation gives 1e-2."""
TIES_PER_MILLION = 50
"""Activations that may differ: those within float noise of a tie. A trained nano has 6 per million."""
TIES_ALLOWED = 3
"""Below 60,000 activations one tie would already exceed the rate, so this many are always allowed."""
TOP1 = 0.995
"""Free-running agreement of the likeliest token: ties move near-equal logits only."""
POSITIONS_ALLOWED = 1
"""Below 200 positions one near-tie would already exceed the rate."""
DRIFT = 1e-3
"""Largest difference of the memory after writes and of its readings, with equal activations. |dM| is 6e-6 after 300
writes in float32."""
FORGET_DRIFT = 1e-1
"""A forget divides by d = s2 - w U w', which is s2^2 / (v + s2), about 1e-4: float32 noise of 1e-7 becomes 1e-3, and
keys that resemble each other add another factor of ten. A forget that is wrong leaves a row of size 1."""
QUALITY_LOSS = 0.05
"""Share of right answers that a narrower storage may cost: the bar that ternary training itself is held to."""


@dataclass
class Verdict:
    verdict: str
    reasons: list[str] = field(default_factory=list)
    """Sentences."""

    @property
    def exit_status(self) -> int:
        return int(self.verdict == FAIL)


def judge(metrics: Metrics) -> Verdict:
    """Is it the same function? FAIL: an error. AMBIGUOUS: a difference that replay removes. PASS: no difference."""
    failures = _free_failures(metrics.free)
    if metrics.replayed is None or metrics.differences is None:
        if not _differs(metrics) and not failures:
            return Verdict(PASS, ["no difference beyond float noise; " + str(metrics.replay_unavailable)])
        unexplained = (
            f"a difference, and nothing to tell a rounding tie from an error: {metrics.replay_unavailable}"
        )
        return Verdict(FAIL, [*failures, unexplained])
    failures += _replay_failures(metrics)
    if failures and metrics.differences.first is not None:
        failures.insert(0, metrics.differences.first.sentence)
    if failures:
        return Verdict(FAIL, failures)
    differences = metrics.differences
    if _differs(metrics):
        return Verdict(
            AMBIGUOUS,
            [
                f"free-running, {metrics.free.samples - metrics.free.equal} of {metrics.free.samples} answers and "
                f"logits by up to {metrics.free.logits_max_abs_diff:.1e} differ; replay removes it: "
                f"{differences.activations_differing} of {differences.activations} int8 activations met a rounding "
                f"tie (within {differences.max_tie_distance:.1e}), and with equal activations every integer sum and "
                "every token is equal"
            ],
        )
    return Verdict(PASS, [f"every answer is equal and no logit differs by more than {LOGITS:g}"])


def judge_precision(metrics: Metrics, difference: Interval) -> Verdict:
    """Judges the cost of narrower weights. `difference`: share of right answers, candidate minus reference.

    Not a question of right or wrong arithmetic, so no logit decides: FAIL when the whole interval lies beyond the
    allowed loss, PASS when none of it does, AMBIGUOUS when the samples are too few to tell.
    """
    figures = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] of the answers right"
    if metrics.free.logits_max_abs_diff == float("inf"):
        return Verdict(FAIL, ["the candidate's logits are not finite"])
    if difference.high < -QUALITY_LOSS:
        return Verdict(FAIL, [f"{figures}: a loss of more than {QUALITY_LOSS}"])
    if difference.low < -QUALITY_LOSS:
        unsure = f"{figures}: too few samples to exclude a loss of {QUALITY_LOSS}; give more --images"
        return Verdict(AMBIGUOUS, [unsure])
    return Verdict(PASS, [f"{figures}: a loss of {QUALITY_LOSS} is excluded"])


def _differs(metrics: Metrics) -> bool:
    free = metrics.free
    return (
        free.equal < free.samples
        or not free.logits_max_abs_diff <= LOGITS
        or not metrics.drift.largest <= DRIFT
    )


def _free_failures(free: Agreement) -> list[str]:
    missed = free.positions - free.top1_equal
    if missed > max(POSITIONS_ALLOWED, (1 - TOP1) * free.positions):
        return [
            f"teacher-forced, the likeliest token agrees at {free.top1_agreement:.4f} of positions, below {TOP1}"
        ]
    return []


def _replay_failures(metrics: Metrics) -> list[str]:
    replayed, differences, drift = metrics.replayed, metrics.differences, metrics.replayed_drift
    assert replayed is not None
    assert differences is not None
    failures = []
    if differences.sums_differing:
        failures.append(
            f"{differences.sums_differing} of {differences.sums} integer sums differ with equal activations"
        )
    if not differences.sums:
        failures.append("no integer sum was compared")
    if differences.operator_mismatches:
        failures.append(
            f"{differences.operator_mismatches} of {differences.operator_outputs} outputs of the operators are not "
            "their sums times their scales"
        )
    if differences.scales_differing:
        failures.append(f"{differences.scales_differing} scaled sums differ whose sums are equal")
    if replayed.equal < replayed.samples:
        failures.append(
            f"with equal activations {replayed.samples - replayed.equal} of {replayed.samples} answers differ"
        )
    if not replayed.logits_max_abs_diff <= LOGITS:
        failures.append(
            f"with equal activations logits differ by {replayed.logits_max_abs_diff:.1e}, more than {LOGITS:g}"
        )
    if differences.activations_differing > max(
        TIES_ALLOWED, TIES_PER_MILLION * differences.activations / 1e6
    ):
        failures.append(
            f"{differences.activations_differing} of {differences.activations} int8 activations differ, over "
            f"{TIES_PER_MILLION} per million"
        )
    if differences.max_step > TIE_STEP:
        failures.append(f"an int8 activation differs by {differences.max_step}, which is not a tie")
    if differences.max_tie_distance > TIE_DISTANCE:
        failures.append(
            f"an int8 activation differs {differences.max_tie_distance:.1e} from a tie, more than {TIE_DISTANCE:g}"
        )
    if drift is not None and not drift.largest <= DRIFT:
        failures.append(
            f"with equal activations the memory drifts by {drift.largest:.1e}, more than {DRIFT:g}"
        )
    if drift is not None and not drift.forgotten <= FORGET_DRIFT:
        failures.append(
            f"with equal activations forgetting differs by {drift.forgotten:.1e}, more than {FORGET_DRIFT:g}"
        )
    return failures
