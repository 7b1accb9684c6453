"""Put pictures together: drawings with an alpha channel, photographs as tiles and grounds, noise and textures. Pillow.

Boxes are (left, top, right, bottom) as shares of the side.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

Box = tuple[float, float, float, float]
SIDE = 256
"""Side of every composed picture, pixels."""
STRANGER_KINDS = ("noise", "blocks", "stripes", "gradient", "texture", "blobs")


def open_photo(jpeg: bytes) -> Image.Image:
    """A photograph in RGB."""
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def crop(photo: Image.Image, rng: np.random.Generator, least: float, size: tuple[int, int]) -> Image.Image:
    """A random part of a photograph, at least `least` of the largest that has the sides' ratio, perhaps mirrored."""
    width, height = photo.size
    ratio = size[0] / size[1]
    widest = min(width, height * ratio)
    w = widest * rng.uniform(least, 1)
    h = w / ratio
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    part = photo.resize(size, Image.Resampling.BICUBIC, (x, y, x + w, y + h), reducing_gap=2.0)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def recolour(drawing: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """A drawing uint8 [S, S, 4] in one colour: its alpha channel stays."""
    result = drawing.copy()
    result[..., :3] = colour
    return result


def place(
    canvas: Image.Image, drawing: np.ndarray, size: float, angle: float, centre: tuple[float, float]
) -> Box | None:
    """Paste a drawing uint8 [S, S, 4] of `size` (share of the side) turned by `angle` degrees -> the box of what shows.

    None where less than a third of it lies on the canvas.
    """
    pixels = max(8, round(size * canvas.width))
    scaling = Image.Resampling.BOX if pixels * 2 < len(drawing) else Image.Resampling.BICUBIC
    piece = Image.fromarray(drawing, "RGBA").resize((pixels, pixels), scaling)
    if angle:
        piece = piece.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    inked = piece.getchannel("A").point(lambda value: 255 * (value > 64)).getbbox()
    if inked is None:
        return None
    piece = piece.crop(inked)
    left = round(centre[0] * canvas.width - piece.width / 2)
    top = round(centre[1] * canvas.height - piece.height / 2)
    shown = (
        max(left, 0),
        max(top, 0),
        min(left + piece.width, canvas.width),
        min(top + piece.height, canvas.height),
    )
    if (shown[2] - shown[0]) * (shown[3] - shown[1]) * 3 < piece.width * piece.height:
        return None
    canvas.paste(piece, (left, top), piece)
    side = canvas.width
    return shown[0] / side, shown[1] / side, shown[2] / side, shown[3] / side


def with_noise(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """uint8 [side, side, 3] with changed brightness and contrast, sometimes blurred, sometimes with noise."""
    if rng.random() < 0.15:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    pixels = np.asarray(picture, np.float32)
    mean = pixels.mean()
    pixels = (pixels - mean) * rng.uniform(0.85, 1.15) + mean + rng.uniform(-12, 12)
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, rng.uniform(1, 6), pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def stranger(kind: str, rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """A picture of nothing, uint8 [side, side, 3]: one of `STRANGER_KINDS`."""
    colours = rng.integers(0, 256, (8, 3))
    y, x = np.mgrid[0:side, 0:side] / side
    if kind == "noise":
        cells = int(rng.choice([16, 32, 64, 128, side]))
        grain = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        return np.asarray(Image.fromarray(grain).resize((side, side), Image.Resampling.NEAREST))
    if kind == "blocks":
        cells = int(rng.integers(2, 9))
        chosen = colours[rng.integers(0, len(colours), (cells, cells))].astype(np.uint8)
        return np.asarray(Image.fromarray(chosen).resize((side, side), Image.Resampling.NEAREST))
    if kind == "stripes":
        angle, period = rng.uniform(0, np.pi), rng.uniform(0.03, 0.3)
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
        weight = ((wave > 0) if rng.random() < 0.5 else (wave + 1) / 2)[..., None]
        return (weight * colours[0] + (1 - weight) * colours[1]).astype(np.uint8)
    if kind == "gradient":
        weight = (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))[..., None]
        weight = (weight - weight.min()) / max(float(np.ptp(weight)), 1e-6)
        return (weight * colours[0] + (1 - weight) * colours[1]).astype(np.uint8)
    if kind == "texture":
        # Noise with a spectrum that falls like that of photographs.
        frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) + 1 / side
        layers = [
            np.fft.ifft2(
                np.fft.fft2(rng.normal(size=(side, side))) / frequencies ** rng.uniform(0.6, 1.8)
            ).real
            for _ in range(3)
        ]
        scaled = [(layer - layer.mean()) / layer.std() * 50 + rng.uniform(60, 190) for layer in layers]
        return np.clip(np.stack(scaled, -1), 0, 255).astype(np.uint8)
    picture = np.full((side, side, 3), colours[0], np.uint8)
    for number in range(int(rng.integers(3, 12))):
        cx, cy, radius, squash = (
            rng.uniform(0, 1),
            rng.uniform(0, 1),
            rng.uniform(0.05, 0.4),
            rng.uniform(0.4, 2.5),
        )
        picture[(x - cx) ** 2 + ((y - cy) * squash) ** 2 < radius**2] = colours[number % len(colours)]
    return picture
