"""Samples training drawings of one emoji each: which emoji, and by which vendor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from microvlm.training.emoji.data.drawing_sources import TRAIN_VENDORS
from microvlm.training.emoji.data.emoji import EmojiData

SEEN_SHARE = 0.7
"""Share of the drawings that show a seen emoji, one whose caption may be trained on."""


class DrawingSampler:
    """Samples (emoji row, vendor) pairs of the TRAIN vendors; the emoji is a seen one with probability `seen_share`."""

    def __init__(self, emoji: EmojiData, weights: dict[str, float], seen_share: float = SEEN_SHARE):
        self.vendors = [vendor for vendor in TRAIN_VENDORS if weights.get(vendor, 1.0) > 0]
        self.images = {vendor: np.asarray(emoji.images(vendor)) for vendor in self.vendors}
        rate = np.array([weights.get(vendor, 1.0) for vendor in self.vendors])
        present = np.stack([emoji.present(vendor) for vendor in self.vendors], 1) * rate
        self.cumulative = np.cumsum(present / np.maximum(present.sum(1, keepdims=True), 1e-9), 1)
        self.drawn = present.sum(1) > 0
        self.seen_rows = np.flatnonzero(emoji.is_seen & self.drawn)
        unseen = np.flatnonzero(~emoji.is_seen & self.drawn)
        # A small data folder may have no unseen emoji.
        self.other_rows = unseen if len(unseen) else self.seen_rows
        self.seen_share = seen_share

    def rows(self, count: int, generator: torch.Generator) -> np.ndarray:
        """int64 [count]: random emoji rows."""
        uniform = torch.rand(count, 2, generator=generator).numpy()
        seen_choice = self.seen_rows[(uniform[:, 1] * len(self.seen_rows)).astype(int)]
        other_choice = self.other_rows[(uniform[:, 1] * len(self.other_rows)).astype(int)]
        return np.where(uniform[:, 0] < self.seen_share, seen_choice, other_choice)

    def vendors_of(self, rows: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """int64 [B]: a random vendor (index) for each row, among those that drew it."""
        uniform = torch.rand(len(rows), generator=generator).numpy()
        index = (uniform[:, None] >= self.cumulative[rows]).sum(1)
        return np.minimum(index, len(self.vendors) - 1)

    def pixels(self, rows: np.ndarray, vendors: np.ndarray) -> Tensor:
        """The drawings of `rows` by `vendors`, uint8 [B, S, S, 4]."""
        return torch.from_numpy(
            np.stack([self.images[self.vendors[v]][r] for r, v in zip(rows, vendors, strict=True)])
        )
