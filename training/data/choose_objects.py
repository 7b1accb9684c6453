"""Chooses the 48 scene objects by a documented rule; it was run once, and its result is committed.

The rule: among the test emoji of the groups animals, food, travel and objects whose caption is one word
of at most 12 letters and which all five large coloured TRAIN sets draw: for each set, the distance of
its 24 x 24 pixels to the nearest class mean of another emoji, less that to its own class mean, both
means taken over the other sets. The 48 emoji with the largest mean margin. An object is hidden on a
ground where, averaged over the same sets, at least .6 of its drawing is within .3 of the ground's
colour (a yellow star on yellow). It does not use the test and the stress vendor.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from microvlm.training.data.drawing_sources import TRAIN_VENDORS
from microvlm.training.data.emoji import EmojiData
from microvlm.training.data.scenes import GROUNDS
from microvlm.training.data.views import plain_emoji

GROUPS = ("animals-nature", "food-drink", "travel-places", "objects")
COUNT = 48
LONGEST = 12
HIDDEN_SHARE, HIDDEN_DISTANCE = 0.6, 0.3
VENDORS = tuple(v for v in TRAIN_VENDORS if v not in ("fluent-emoji-high-contrast", "fxemoji"))


def small_pixels(emoji: EmojiData, vendor: str, rows: np.ndarray, side: int = 24) -> np.ndarray:
    """The plain view averaged to side x side pixels: float32 [len(rows), side * side * 3]."""
    images = plain_emoji(torch.from_numpy(np.array(emoji.images(vendor)[rows])))
    return F.interpolate(images, size=side, mode="area").flatten(1).numpy()


def hidden_on(emoji: EmojiData, row: int) -> list[str]:
    """Names of the grounds on which this emoji is too hard to see."""
    pixels = np.stack([emoji.images(v)[row] for v in VENDORS]) / 255
    alpha = pixels[..., 3]
    names = []
    for name, colour in GROUNDS:
        near = np.linalg.norm(pixels[..., :3] - np.array(colour) / 255, axis=-1) < HIDDEN_DISTANCE
        if ((near * alpha).sum((1, 2)) / alpha.sum((1, 2))).mean() >= HIDDEN_SHARE:
            names.append(name)
    return names


def choose_scene_objects(emoji: EmojiData) -> list[str]:
    """The lines of scene_objects.txt, in Unicode order: hexcode, caption, hidden grounds."""
    drawn = np.stack([emoji.present(v) for v in VENDORS])
    plain = np.array([c.isalpha() and len(c) <= LONGEST for c in emoji.captions])
    candidates = emoji.is_seen & plain & np.isin(emoji.groups, GROUPS) & drawn.all(0)
    rows = np.flatnonzero(candidates)
    drawn = drawn[:, rows]
    pixels = np.stack([small_pixels(emoji, v, rows) for v in VENDORS])
    total, count = (pixels * drawn[:, :, None]).sum(0), drawn.sum(0)
    margins = np.full(drawn.shape, np.nan)
    for v in range(len(VENDORS)):
        means = (total - pixels[v] * drawn[v][:, None]) / (count - drawn[v])[:, None]
        squared = (pixels[v] ** 2).sum(1)[:, None] + (means**2).sum(1) - 2 * pixels[v] @ means.T
        distance = np.sqrt(squared.clip(0))
        own = np.diag(distance).copy()
        np.fill_diagonal(distance, np.inf)
        margins[v] = np.where(drawn[v], distance.min(1) - own, np.nan)
    best = np.sort(np.argsort(-np.nanmean(margins, 0), kind="stable")[:COUNT])
    return [f"{emoji.hexcodes[i]}\t{emoji.captions[i]}\t{','.join(hidden_on(emoji, i))}" for i in rows[best]]
