"""Patch labels follow the places of the drawings, and emoji grids show what their labels say."""

import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py")

from drawn_emoji import colour

from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.batches.emoji_grids import patch_labels, sample_emoji_grids, scene_labels
from microvlm.training.emoji.data.emoji import load_emoji
from microvlm.training.emoji.data.scenes import Placed, Scene

LEFT, UPPER_RIGHT = Placed(7, 0.25, 0.5, 0.4), Placed(3, 0.75, 0.25, 0.3)


def test_a_patch_is_labelled_by_the_drawing_over_its_centre():
    labels = scene_labels([Scene(0, (LEFT, UPPER_RIGHT)), Scene(0, (UPPER_RIGHT,))], np.arange(48), 4)
    assert labels.reshape(2, 4, 4).tolist() == [
        [[0, 0, 4, 4], [8, 8, 4, 4], [8, 8, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]


def test_an_object_of_size_zero_labels_nothing():
    assert not patch_labels(np.array([[5]]), np.array([[[0.5, 0.5, 0.0]]]), 8).any()


def test_a_grid_shows_each_emoji_where_its_label_says(drawn_build):
    emoji = load_emoji(drawn_build[0])
    sampler = DrawingSampler(emoji, {}, seen_share=1.0)
    label_of = np.arange(len(emoji.hexcodes))
    grids = sample_emoji_grids(
        sampler, label_of, 24, 96, 0.0, np.random.default_rng(3), torch.Generator().manual_seed(3)
    )
    assert grids.pixels.shape == (24, 3, 96, 96)
    emoji_count = 0
    for image, labels, places in zip(grids.pixels, grids.labels, grids.places, strict=True):
        assert 1 <= (places[:, 2] > 0).sum() <= 4
        for label, (x, y, size) in zip(labels, places, strict=True):
            if size and label < 48:
                centre = image[:, int(y * 96), int(x * 96)] * 255
                assert torch.allclose(centre, torch.tensor(colour(label)).float(), atol=2), (label, x, y)
                emoji_count += 1
    assert emoji_count > 30


def test_no_grid_is_an_empty_batch(drawn_build):
    sampler = DrawingSampler(load_emoji(drawn_build[0]), {})
    grids = sample_emoji_grids(
        sampler, np.arange(51), 0, 96, 1.0, np.random.default_rng(0), torch.Generator().manual_seed(0)
    )
    assert grids.pixels.shape == (0, 3, 96, 96)
    assert patch_labels(grids.labels, grids.places, 8).shape == (0, 64)
