"""Views of training pictures: as inference sees them, or a random part with other light."""

import dataclasses
import io

import numpy as np
from PIL import Image

from microvlm.presets import preset
from microvlm.training.batches.picture_views import plain_view, random_view

PADDED = preset("nano").vision
STRETCHED = dataclasses.replace(preset("photo").vision, image_size=128)


def wide_picture() -> bytes:
    noise = np.random.default_rng(0).integers(0, 200, (4, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((400, 200), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def white_share(view: np.ndarray) -> float:
    return float((view == 255).all(-1).mean())


def test_a_plain_view_is_padded_or_stretched_as_the_model_sees_it():
    picture = wide_picture()
    padded, stretched = plain_view(picture, PADDED), plain_view(picture, STRETCHED)
    assert padded.shape == (96, 96, 3)
    assert stretched.shape == (128, 128, 3)
    assert white_share(padded) > 0.4
    assert white_share(stretched) == 0


def test_random_views_of_a_stretching_model_have_no_white_beside_the_picture():
    picture = wide_picture()
    views = [random_view(picture, STRETCHED, np.random.default_rng(seed), 1.0) for seed in range(12)]
    assert all(view.shape == (128, 128, 3) for view in views)
    assert max(map(white_share, views)) < 0.02
    assert len({view.tobytes() for view in views}) == len(views)
    assert np.array_equal(
        random_view(picture, STRETCHED, np.random.default_rng(0), 0.0), plain_view(picture, STRETCHED)
    )
