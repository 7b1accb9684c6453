"""The score that ends a run: its name, its value, and whether an evaluation reaches it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.training.watching import names

SCORES = {
    "loss": (names.EVALUATION_LOSS, False),
    "perplexity": (names.EVALUATION_PERPLEXITY, False),
    "token_accuracy": (names.EVALUATION_TOKEN_ACCURACY, True),
    "alignment_recall_at_1": (names.EVALUATION_RECALL, True),
    "episode_loss": (names.EVALUATION_EPISODE_ON, False),
    "text_perplexity": (names.EVALUATION_TEXT_PERPLEXITY, False),
}
"""Name of a score -> its metric of evaluations.jsonl, and whether more is better. All are of held-out samples."""


@dataclass(frozen=True)
class ScoreTarget:
    """A score that a run is to reach."""

    name: str
    value: float

    @property
    def metric(self) -> str:
        return SCORES[self.name][0]

    @property
    def higher_is_better(self) -> bool:
        return SCORES[self.name][1]

    def is_met(self, values: Mapping[str, object]) -> bool:
        """Whether the values of an evaluation reach it; not if they lack the score, or if it is no number."""
        value = values.get(self.metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return value >= self.value if self.higher_is_better else value <= self.value

    def require(self, values: Mapping[str, object]) -> None:
        """Raises UserError for an evaluation that does not have this score."""
        if self.metric not in values:
            there = [name for name, (metric, _) in SCORES.items() if metric in values]
            what = f"it measures {', '.join(there)}" if there else "its data has no samples for validation"
            hint = "; --text FILE adds text_perplexity" if self.name == "text_perplexity" else ""
            raise UserError(f"--until {self.name}: this run does not measure it: {what}{hint}.")

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.higher_is_better else '<='} {self.value:g}"


def parse_target(text: str) -> ScoreTarget:
    """`loss=2.5`, `token_accuracy=0.6`. Raises UserError."""
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name.strip() not in SCORES or not math.isfinite(value):
        raise UserError(
            f"--until is {quote(text)}: give NAME=VALUE with a name of {', '.join(SCORES)}, as in loss=2.5."
        )
    return ScoreTarget(name.strip(), value)
