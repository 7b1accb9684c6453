"""Answers of a model with their confidence: what is said, what is declined, and what else it could be. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from microvlm.answers.likeliest import Completion, find_likeliest
from microvlm.errors import UserError
from microvlm.generation import GenerationResult, OnToken, Prompt, Timings, generate
from microvlm.runtime import Memories, MemoryArrays, Runtime

if TYPE_CHECKING:
    from microvlm.configuration.answers import AnswersConfig
    from microvlm.inputs.processor import Processor
    from microvlm.sampling import GenerationOptions

GUESSES = 2
"""Likeliest answers that commands show."""
MOST_GUESSES = 16


class Guess(NamedTuple):
    """One of the likeliest answers."""

    text: str
    log_probability: float
    """Natural, of the whole answer with its stop token."""
    confidence: float | None
    """None for a model that was never calibrated."""


@dataclass(frozen=True)
class Answer:
    """An answer, and how sure the model is of it."""

    text: str
    """What is said: the declining text, as the configuration spells it, where the answer is declined."""
    own_text: str
    """The model's own words, also of a declined answer."""
    tokens: list[int]
    """Token ids of the model's own words."""
    log_probability: float | None
    """Natural, of the model's own words with the stop token; None where the backend does not tell."""
    confidence: float | None
    """Calibrated probability, 0 to 1, that the model's own words are right. None for a model that was never calibrated,
    for words that decline, which name nothing, and for an answer that could see the memory, where no map is fitted."""
    declined: bool
    """Whether the confidence is below the threshold, or the model's own words decline."""
    from_memory: bool
    """Whether the memory was in scope."""
    guesses: list[Guess] | None = None
    """The likeliest answers that do not decline, the likeliest first; None where they were not asked for."""


def check_share(min_confidence: float | None) -> None:
    """Raise UserError for a threshold that no model accepts."""
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise UserError(f"--min-confidence is {min_confidence:g}; give 0 to 1.")


def check_min_confidence(config: AnswersConfig | None, min_confidence: float | None) -> None:
    """Raise UserError for a threshold that is no share, or that the model's answers cannot be held against."""
    check_share(min_confidence)
    if min_confidence and (config is None or not config.is_calibrated):
        raise UserError(
            "--min-confidence needs a model whose answers were calibrated, and this one's were not: leave it out, or "
            "calibrate the model with microvlm-score --fit-answers."
        )


def answer_prompt(
    runtime: Runtime,
    processor: Processor,
    prompt: Prompt,
    options: GenerationOptions,
    memory: Memories | None = None,
    guesses: int = 0,
    min_confidence: float | None = None,
    timings: Timings | None = None,
    on_token: OnToken | None = None,
) -> list[Answer]:
    """Answer a batch of embedded prompts, and find each one's `guesses` likeliest answers.

    `min_confidence` takes the place of the model's own threshold; 0 declines what the model's own words decline, and
    nothing else. `on_token` gets the tokens of the model's own words, before it is known whether they are declined.
    Raises UserError as `generate` and `check_min_confidence` do.
    """
    timings = timings or Timings()
    check_min_confidence(runtime.config.answers, min_confidence)
    if not 0 <= guesses <= MOST_GUESSES:
        raise UserError(f"guesses= is {guesses}; give 0 to {MOST_GUESSES}.")
    result = generate(runtime, prompt, options, memory, on_token, timings)
    answers = judge(runtime.config.answers, processor, result, min_confidence)
    if not guesses:
        return answers
    with timings.phase("guesses"):
        return [
            dataclasses.replace(
                answer, guesses=_guesses(runtime, processor, prompt, options, memory, result, row, guesses)
            )
            for row, answer in enumerate(answers)
        ]


def judge(
    config: AnswersConfig | None,
    processor: Processor,
    result: GenerationResult,
    min_confidence: float | None = None,
) -> list[Answer]:
    """The answers of the decode loop's result, one a row, without guesses."""
    answers = []
    for row, tokens in enumerate(result.tokens):
        own_text, log_probability = processor.decode(tokens).strip(), result.log_probability(row)
        from_memory = bool(result.memory_slot.slot_mask[row])
        text, confidence, declined = own_text, None, False
        if config is not None:
            declining_text = config.declining_text(own_text)
            declined = declining_text is not None
            text = declining_text or own_text
            if not declined and not from_memory and log_probability is not None:
                confidence = config.confidence(log_probability)
            threshold = config.threshold if min_confidence is None else min_confidence
            if confidence is not None and confidence < threshold:
                text, declined = config.decline, True
        answers.append(Answer(text, own_text, tokens, log_probability, confidence, declined, from_memory))
    return answers


def _guesses(
    runtime: Runtime,
    processor: Processor,
    prompt: Prompt,
    options: GenerationOptions,
    memory: Memories | None,
    result: GenerationResult,
    row: int,
    count: int,
) -> list[Guess]:
    """The likeliest answers to one row's prompt, the likeliest first."""
    config = runtime.config.answers
    one = Prompt(prompt.inputs_embeds[row : row + 1], prompt.attention_mask[row : row + 1])
    if isinstance(memory, MemoryArrays) and len(memory.mean) > 1:
        memory = MemoryArrays(*(part[row : row + 1] for part in memory))
    known = None
    if options.temperature == 0 and result.log_probabilities:
        known = Completion(result.tokens[row], result.log_probabilities[row])

    def text_of(tokens: list[int]) -> str:
        return processor.decode(tokens).strip()

    def is_name(text: str) -> bool:
        return bool(text) and (config is None or not config.is_declining(text))

    from_memory = bool(result.memory_slot.slot_mask[row])
    found = find_likeliest(runtime, one, options, memory, count, text_of, is_name, known)
    return [
        Guess(text, value, None if config is None or from_memory else config.confidence(value))
        for text, value in found
    ]
