"""Predicts time and memory of a recipe on a machine from its arithmetic. Measures nothing: every figure is named so.

Counts multiply-adds of the forward pass and of what the backward pass needs: gradients of activations through frozen
layers cost as much as the forward pass, those of weights that learn as much again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from microvlm.config import MicroVLMConfig
from microvlm.formats.weight_shapes import weight_shapes
from microvlm.training.parameter_selection import relative_rates
from microvlm.training.recipe import Recipe, StageConfig

PROMPT_TOKENS, ANSWER_TOKENS = 12, 12
"""Assumed tokens of a prompt without its picture, and of an answer."""
UTILISATION = (0.15, 0.40)
"""Assumed shares of a machine's peak that training reaches."""
ACTIVATION_BYTES = 40
"""Assumed bytes kept for the backward pass, for each position, layer and unit of width, in bfloat16."""


@dataclass(frozen=True)
class Machine:
    """A machine as its maker describes it."""

    name: str
    peak_flops: float
    """Of bfloat16 products with float32 sums, operations a second."""
    memory_bytes: float


MACHINES = {"rtx3090": Machine("GeForce RTX 3090, 24 GB", 71e12, 24e9)}


def predict_costs(recipe: Recipe, config: MicroVLMConfig, samples: int, machine: Machine) -> dict[str, Any]:
    """Part of a document of kind `training_costs`: for each stage of `recipe` its predicted hours and bytes.

    samples : training samples of the data, for stages that are counted in epochs.
    """
    return {
        "report": "training_costs",
        "recipe": recipe.name,
        "model": config.name,
        "machine": machine.name,
        "samples": samples,
        "assumed": {
            "prompt_tokens": PROMPT_TOKENS,
            "answer_tokens": ANSWER_TOKENS,
            "utilisation_low": UTILISATION[0],
            "utilisation_high": UTILISATION[1],
        },
        "stages": [_stage(stage, config, samples, machine) for stage in recipe.stages],
    }


def _stage(stage: StageConfig, config: MicroVLMConfig, samples: int, machine: Machine) -> dict[str, Any]:
    shapes = weight_shapes(config)
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    rates = relative_rates(sizes, stage.caption.trained)
    learning = {name for name, rate in rates.items() if rate > 0}
    flops = _flops_a_sample(config, stage, sizes, learning)
    seen = round(samples * stage.epochs) if stage.epochs else stage.steps * stage.batch_size
    hours = [flops * seen / (machine.peak_flops * share) / 3600 for share in reversed(UTILISATION)]
    trained = sum(sizes[name] for name in learning)
    return {
        "name": stage.name,
        "samples_seen": seen,
        "trainable_params": trained,
        "predicted_flops_a_sample": flops,
        "predicted_hours_low": hours[0],
        "predicted_hours_high": hours[1],
        "predicted_bytes": _bytes(config, stage, sum(sizes.values()), trained),
    }


def _flops_a_sample(
    config: MicroVLMConfig, stage: StageConfig, sizes: dict[str, int], learning: set[str]
) -> float:
    """Floating-point operations of one sample's step: twice its multiply-adds."""
    positions = config.prefix_tokens + PROMPT_TOKENS + ANSWER_TOKENS
    rows = {
        "vision": config.vision.num_patches + config.vision.num_leading_tokens,
        "adapter": config.prefix_tokens,
        # Captions that are written, questions that read, prompts that look.
        "memory_encoder": stage.caption.episode_share * positions + PROMPT_TOKENS + positions,
        "decoder": positions + stage.caption.episode_share * (PROMPT_TOKENS + ANSWER_TOKENS),
        "embedding": ANSWER_TOKENS * (1 + stage.caption.episode_share),
    }
    teacher = 1.0 if stage.caption.teacher is not None else 0.0
    total = 0.0
    for name, size in sizes.items():
        part = name.split(".")[0]
        count = rows.get(part)
        if count is None or not name.endswith("weight"):
            continue
        backward = 0.0 if part == "vision" and not any(n.startswith("vision.") for n in learning) else 1.0
        passes = 1.0 + backward + (1.0 if name in learning else 0.0)
        passes += teacher if part in ("vision", "adapter", "decoder", "embedding") else 0.0
        total += 2.0 * size * count * passes
    return total


def _bytes(config: MicroVLMConfig, stage: StageConfig, params: int, trained: int) -> float:
    """Weights in float32, gradients and two moments of what learns, activations of a batch; a teacher's weights."""
    positions = config.prefix_tokens + PROMPT_TOKENS + ANSWER_TOKENS
    rows = stage.batch_size * (1 + stage.caption.episode_share)
    decoder = config.text.num_hidden_layers * positions * config.text.hidden_size * ACTIVATION_BYTES * rows
    logits = rows * ANSWER_TOKENS * config.text.vocab_size * 8
    weights = 4 * params * (2 if stage.caption.teacher is not None else 1)
    return weights + 12 * trained + decoder + logits
