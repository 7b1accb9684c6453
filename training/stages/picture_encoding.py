"""How stages run a vision encoder under mixed precision."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_ops import full_precision


def vision_features(model: MicroVLM, pixel_values: Tensor) -> Tensor:
    """The encoder's tokens [N, tokens, width] of normalised pixels [N, 3, S, S].

    A convolutional encoder runs in float32 whatever the stage's precision: it does not learn, and its whole numbers and
    class probabilities must be those that the trained model sees at inference.
    """
    is_exact = model.config.vision.is_convolutional
    with full_precision(pixel_values.device.type) if is_exact else nullcontext():
        features: Tensor = model.vision(pixel_values)
    return features
