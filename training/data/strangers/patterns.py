"""Synthetic pictures without a thing in them: noise, stripes, blocks, gradients, textures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Generator = np.random.Generator


def draw(kind: str, generator: Generator, side: int) -> np.ndarray:
    """One picture of a kind of `KINDS`, uint8 [side, side, 3]. Raises KeyError for another kind."""
    return np.clip(np.rint(KINDS[kind](generator, side)), 0, 255).astype(np.uint8)


def _noise(generator: Generator, side: int) -> np.ndarray:
    """Independent values, grey or coloured, uniform or normal, in grains of 1 to 6 pixels."""
    grain = int(generator.integers(1, 7))
    shape = (-(-side // grain), -(-side // grain), int(generator.choice([1, 3])))
    if generator.random() < 0.5:
        values = generator.uniform(0, 255, shape)
    else:
        values = generator.normal(generator.uniform(60, 200), generator.uniform(15, 70), shape)
    return np.broadcast_to(_enlarged(values, grain, side), (side, side, 3))


def _stripes(generator: Generator, side: int) -> np.ndarray:
    """Bands of two to four colours at any angle, hard or soft, sometimes crossed by a second set."""
    shade = _waves(generator, side)
    if generator.random() < 0.3:
        shade = (shade + _waves(generator, side)) / 2
    colours = _colours(generator, int(generator.integers(2, 5)))
    if generator.random() < 0.6:
        return colours[np.minimum((shade * len(colours)).astype(int), len(colours) - 1)]
    places = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(shade, places, colours[:, channel]) for channel in range(3)], -1)


def _blocks(generator: Generator, side: int) -> np.ndarray:
    """A grid of rectangles of random colours, or of a chessboard's two."""
    rows, columns = (int(number) for number in generator.integers(2, 17, 2))
    colours = _colours(generator, rows * columns).reshape(rows, columns, 3)
    if generator.random() < 0.3:
        two = _colours(generator, 2)
        colours = two[np.add.outer(np.arange(rows), np.arange(columns)) % 2]
    at_row, at_column = (np.arange(side) * number // side for number in (rows, columns))
    return colours[at_row][:, at_column]


def _gradients(generator: Generator, side: int) -> np.ndarray:
    """A smooth change between two or three colours, along a line or from a place outwards."""
    y, x = np.mgrid[0:side, 0:side] / side
    if generator.random() < 0.5:
        angle = generator.uniform(0, 2 * np.pi)
        distance = x * np.cos(angle) + y * np.sin(angle)
    else:
        centre = generator.uniform(-0.2, 1.2, 2)
        distance = np.hypot(x - centre[0], y - centre[1])
    share = _stretched(distance)
    colours = _colours(generator, int(generator.integers(2, 4)))
    places = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(share, places, colours[:, channel]) for channel in range(3)], -1)


def _textures(generator: Generator, side: int) -> np.ndarray:
    """Noise whose spectrum falls as a power of the frequency, as of cloud, stone and cloth, in any direction."""
    frequency_y, frequency_x = np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None]
    angle, stretch = generator.uniform(0, np.pi), generator.uniform(1, 6)
    along = frequency_x * np.cos(angle) + frequency_y * np.sin(angle)
    across = frequency_y * np.cos(angle) - frequency_x * np.sin(angle)
    radius = np.maximum(np.hypot(along, stretch * across), 1 / side)
    amplitude = radius ** -generator.uniform(0.6, 2.2)
    layers = []
    for _ in range(2):
        spectrum = np.fft.fft2(generator.normal(size=(side, side))) * amplitude
        layers.append(_stretched(np.fft.ifft2(spectrum).real))
    colours = _colours(generator, 3)
    first, second = (layer[..., None] for layer in layers)
    return colours[0] * first + colours[1] * (1 - first) + (colours[2] - 128) * (second - 0.5)


KINDS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "noise": _noise,
    "stripes": _stripes,
    "blocks": _blocks,
    "gradients": _gradients,
    "textures": _textures,
}
"""Kind, as data that declines names it -> a function of generator and side to float [side, side, 3]."""


def _waves(generator: Generator, side: int) -> np.ndarray:
    """Parallel waves [side, side], 0 to 1."""
    y, x = np.mgrid[0:side, 0:side] / side
    angle, count = generator.uniform(0, np.pi), generator.uniform(1.5, 24)
    along = x * np.cos(angle) + y * np.sin(angle)
    return 0.5 + 0.5 * np.sin(2 * np.pi * (count * along + generator.random()))


def _colours(generator: Generator, count: int) -> np.ndarray:
    return generator.uniform(0, 255, (count, 3))


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / max(float(high - low), 1e-12)


def _enlarged(values: np.ndarray, grain: int, side: int) -> np.ndarray:
    return values.repeat(grain, 0).repeat(grain, 1)[:side, :side]


def as_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [side, side, 3] as a Pillow image."""
    return Image.fromarray(pixels)
