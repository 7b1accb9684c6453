"""How sure an answer is, as a model's configuration says it: the map to a confidence, its threshold, and the declining
texts. Knows no model and computes no probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from msgspec import Meta

from microvlm.configuration.checked_fields import Share, check_fields, require

UNKNOWN = "I don't know what this is"
ABSENT = "I don't see one"
NOT_UNDERSTOOD = "I don't understand the question"
LEAST_GAP = 1e-9
"""Between two points of a map."""
MOST_POINTS = 64
LogProbability = Annotated[float, Meta(ge=-1e6, le=0)]
Saying = Annotated[str, Meta(min_length=1, max_length=200)]


@dataclass(frozen=True)
class AnswersConfig:
    """The calibration of a model's answers.

    Without points no answer has a confidence, and none is declined for it. Raises UserError for a map that falls.
    """

    points: Annotated[tuple[LogProbability, ...], Meta(max_length=MOST_POINTS)] = ()
    """Log probabilities of answers, natural, strictly increasing."""
    values: Annotated[tuple[Share, ...], Meta(max_length=MOST_POINTS)] = ()
    """The confidence at each point, not decreasing: the share of such answers that is right. Linear in between, and
    constant outside."""
    threshold: Share = 0.0
    """An answer with less confidence is declined; 0 declines none."""
    decline: Saying = UNKNOWN
    """What is said in place of a declined answer."""
    declining: Annotated[tuple[Saying, ...], Meta(max_length=64)] = (UNKNOWN, ABSENT, NOT_UNDERSTOOD)
    """Answers of the model itself that decline, whatever their probability."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(self.points) == len(self.values), "'points' and 'values' differ in length")
        # Between points any nearer to each other the slope is infinite, and interpolation no number.
        require(
            all(a + LEAST_GAP <= b for a, b in pairwise(self.points)),
            "'points' must increase",
        )
        require(all(a <= b for a, b in pairwise(self.values)), "'values' must not decrease")
        require(bool(self.points) or self.threshold == 0, "'threshold' needs 'points' and 'values'")
        for text in (self.decline, *self.declining):
            require(text.isprintable() and bool(text.strip()), "a declining text cannot be printed")

    @property
    def is_calibrated(self) -> bool:
        return bool(self.points)

    def confidence(self, log_probability: float) -> float | None:
        """The calibrated confidence, 0 to 1, of an answer; None for a model without a map."""
        if not self.points:
            return None
        import numpy as np  # not with the module, which a help text loads too

        return float(np.interp(log_probability, self.points, self.values))

    def declining_text(self, text: str) -> str | None:
        """The declining text that an answer is, as it is written here; None for an answer that does not decline.

        Case, blanks and a final full stop do not matter.
        """
        plain = _plain(text)
        return next((known for known in (self.decline, *self.declining) if _plain(known) == plain), None)

    def is_declining(self, text: str) -> bool:
        """Whether an answer declines in its own words, as `declining_text` compares them."""
        return self.declining_text(text) is not None


def _plain(text: str) -> str:
    return " ".join(text.replace("\u2019", "'").casefold().split()).rstrip(".")
