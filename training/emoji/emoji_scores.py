"""The scores of an emoji folder: the test vendor's drawings, scenes and episodes, next to nearest class means."""

from __future__ import annotations

from typing import Any

from microvlm.errors import UserError
from microvlm.training.emoji.data.baselines import run_baselines
from microvlm.training.emoji.data.emoji import load_emoji
from microvlm.training.emoji.evaluate import paired_difference, score_model
from microvlm.training.scoring.registry import Log, ScoreRequest

_OF_CAPTIONS = ("split", "count", "device", "text", "pictures", "decoder", "words")


def score(request: ScoreRequest, log: Log) -> dict[str, Any]:
    """The document of kind `score`. Raises UserError, also for options that only other scores have."""
    for name in _OF_CAPTIONS:
        if getattr(request, name) is not None:
            raise UserError(
                f"--{name} is not for the scores of emoji: leave it out, or add --scores captions."
            )
    emoji = load_emoji(request.data)
    document: dict[str, Any] = {"report": "score", "model": request.model, "backend": request.backend}
    document |= score_model(request.model, emoji, request.backend, log)
    if request.against is not None:
        other = score_model(request.against, emoji, request.backend, log)
        difference = paired_difference(document["captions"]["correct"], other["captions"]["correct"])
        document["against"] = {"model": request.against, **other, "caption_difference": difference}
    if request.baselines:
        document["baselines"] = run_baselines(emoji)
    return document
