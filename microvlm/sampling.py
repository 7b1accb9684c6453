"""The options of an answer, and how the next token is chosen from logits. numpy only; knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from microvlm.errors import UserError

_OPTION_TYPES = (
    ("max_new_tokens", Integral, "a whole number"),
    ("temperature", Real, "a number"),
    ("top_p", Real, "a number"),
    ("seed", Integral, "a whole number"),
)


@dataclass(frozen=True)
class GenerationOptions:
    """Decoding options of an answer. Raises UserError, which names the value as the command-line flag."""

    max_new_tokens: int = 32
    """The most tokens of one answer."""
    temperature: float = 0.0
    """0 takes the most probable token; otherwise the logits are divided by it and a token is drawn."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have at least this probability (nucleus sampling)."""
    seed: int = 0
    """Every row has its own random generator with this seed, so an answer does not depend on its batch."""
    stop_tokens: tuple[int, ...] | None = None
    """Token ids that end an answer. () is none; None is the model's, where a model's processor completes the options
    (`LoadedModel`, `Chat`, `FactMemory`), and none in the decode loop, which knows no processor."""

    def __post_init__(self) -> None:
        for name, types, kind in _OPTION_TYPES:
            value = getattr(self, name)
            if not isinstance(value, types) or isinstance(value, bool):
                raise UserError(f"--{name.replace('_', '-')} is {value!r}; give {kind}.")
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; give 1 or more.")
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature is {self.temperature:g}; give 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p:g}; give more than 0 and at most 1.")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; give 0 or more.")


class Chooser:
    """Chooses the next token of one row: greedily, or by temperature and top-p with a seeded generator."""

    def __init__(self, options: GenerationOptions):
        self.options = options
        self._generator = np.random.default_rng(options.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """Logits float32 [V] -> a token id, the lowest of equals. Raises UserError for logits that are not numbers."""
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise UserError("the model's logits are not numbers: its weights are damaged, copy them again.")
        if self.options.temperature == 0:
            return best
        order, cumulative = nucleus(logits, self.options.temperature, self.options.top_p)
        draw = self._generator.random() * cumulative[-1]
        return int(order[min(np.searchsorted(cumulative, draw, side="right"), len(order) - 1)])


def log_probability(logits: np.ndarray, token: int) -> float:
    """The natural logarithm of the probability that logits float32 [V] give a token, in float64; at most 0.

    It is the model's own, without temperature and top-p: how an answer was drawn does not change how likely it was.
    """
    below_best = logits.astype(np.float64) - float(logits.max())
    return float(below_best[token] - np.log(np.exp(below_best).sum()))


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The smallest set of most probable tokens that reaches `top_p`, and their cumulative probabilities in float64.

    Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
    """
    # Shifted before the division: a temperature near 0 would divide the largest logit to infinity.
    below_best = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):
        probabilities = np.exp(below_best / temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    cumulative = probabilities[order].cumsum()
    count = int(np.searchsorted(cumulative, top_p)) + 1
    return order[:count], cumulative[:count]
