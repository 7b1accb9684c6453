"""Lengths that a bench is asked for, held against the positions of a model before anything is measured."""

from __future__ import annotations

from pathlib import Path

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError


def check_length(model: Path, flag: str, new_tokens: int, prompt_tokens: int = 0, images: int = 1) -> None:
    """Raise UserError unless images, a prompt and an answer fit the positions of the model in the folder `model`."""
    config = MicroVLMConfig.load(model)
    # One position is the memory slot's.
    room = config.text.max_position_embeddings - 1 - config.prefix_tokens * images - prompt_tokens
    if new_tokens > room:
        raise UserError(
            f"{flag} is {new_tokens}, and {model.name} has positions for {max(room, 0)} after the prompt; give fewer."
        )
