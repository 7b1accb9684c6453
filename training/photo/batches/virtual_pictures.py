"""Feature maps of classes without photographs: real maps, moved towards a class in the metric of real ones.

The classifier that the encoder was trained with knows a direction for each of its classes. Added to a photograph's
features in a part of its map, as much of it as the classifier needs to be sure, it makes features of a picture of that
class: so names are learnt without pictures, as DeCap (arXiv 2303.03032) learns captions from text alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

STEPS = np.geomspace(0.5, 60, 24)
"""Amounts of a direction that are tried."""
LEAST_SURE = 0.1
"""Least probability of the likeliest class for a map to count as its picture."""
SHRINKAGE = 0.1


class VirtualPictures:
    """Makes maps of classes from maps of photographs."""

    def __init__(self, features: np.ndarray, encoder: Mapping[str, Tensor]):
        """`features` are mean features of photographs, in bytes, float32 [n, F]; `encoder` are the tensors of the
        encoder, with the classifier that it was trained with."""
        self.scale = float(encoder["head.output_scale"])
        self.weight, self.bias = encoder["classifier.weight"].float(), encoder["classifier.bias"].float()
        self.width = self.weight.shape[1]
        """F, the features that the classifier reads."""
        self.features = torch.from_numpy(features * self.scale)
        """Mean features of the photographs, float32 [n, F]."""
        centred = self.features
        self.mean = centred.mean(0)
        centred = centred - self.mean
        covariance = centred.T @ centred / len(centred)
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(
            len(covariance)
        )
        directions = self.weight @ covariance
        length = (directions * self.weight).sum(1, keepdim=True).sqrt()
        self.directions = directions / length

    def make(self, maps: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Feature maps uint8 [n, F, S, S] of photographs -> (maps of classes, classes or -1 where none is likely).

        Colours, where there are 3 more channels, stay those of the photograph.
        """
        maps, colours = maps[:, : self.width], maps[:, self.width :]
        count, _, side, _ = maps.shape
        classes = rng.integers(len(self.weight), size=(count,))
        real = torch.from_numpy(maps).float() * self.scale
        # Some photographs are faded towards the mean, so that what they show does not stay visible.
        fade = torch.from_numpy(rng.uniform(0.3, 1.0, (count, 1, 1, 1))).float()
        real = real * fade + (1 - fade) * self.mean[:, None, None]
        mask = torch.from_numpy(np.stack([_part(side, rng) for _ in range(count)])).float()
        direction = self.directions[classes]
        amount = self._amounts(real.mean((2, 3)), classes, mask.mean((1, 2)), rng)[:, None, None, None]
        moved = (real + amount * direction[:, :, None, None] * mask[:, None]).clamp(0, 255 * self.scale)
        made = torch.round(moved / self.scale).to(torch.uint8)
        told = ((made.float() * self.scale).mean((2, 3)) @ self.weight.T + self.bias).softmax(-1)
        chance, found = (part.numpy() for part in told.max(1))
        found = np.where(chance >= LEAST_SURE, found, -1)
        return np.concatenate([made.numpy(), colours], 1), found

    def means(self, features: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mean features [n, F] of photographs -> those of classes, and probabilities [n, classes] by the classifier."""
        classes = rng.integers(len(self.weight), size=len(features))
        fade = torch.from_numpy(rng.uniform(0.3, 1.0, (len(features), 1))).float()
        real = features * fade + (1 - fade) * self.mean
        amount = self._amounts(real, classes, torch.ones(len(real)), rng)
        made = (real + amount[:, None] * self.directions[classes]).clamp(0, 255 * self.scale)
        return made, (made @ self.weight.T + self.bias).softmax(-1)

    def _amounts(
        self, features: Tensor, classes: np.ndarray, share: Tensor, rng: np.random.Generator
    ) -> Tensor:
        """How far mean features [n, F] must move along their class for the classifier to be as sure as is drawn -> [n].

        `share` [n] is the part of the map that moves.
        """
        base = features @ self.weight.T + self.bias
        move = (self.directions[classes] @ self.weight.T) * share[:, None]
        amounts = torch.from_numpy(STEPS).float()
        logits = base[:, None] + amounts[None, :, None] * move[:, None]
        chance = logits.softmax(-1)[torch.arange(len(features)), :, torch.from_numpy(classes)]
        wanted = torch.from_numpy(rng.uniform(0.15, 0.95, len(features))).float()
        return amounts[(chance >= wanted[:, None]).float().argmax(1)]


def _part(side: int, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of places, float64 [side, side] of 0 and 1, from a quarter of the map to all of it."""
    height, width = rng.integers(side // 2, side + 1, 2)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    mask = np.zeros((side, side))
    mask[top : top + height, left : left + width] = 1
    return mask
