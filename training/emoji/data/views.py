"""Draws views of one emoji each, plain or augmented, batched in torch; scenes are drawn by the same steps.

Deterministic given the generator; knows no captions, questions or files. Works on any device. Images are float32
[B, 3, H, W] in 0..1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_SCALE = 0.9
# Each image is passed over about twenty times; so few images stay in the CPU's cache.
_CPU_CHUNK = 32
_LUMA = (0.299, 0.587, 0.114)


class Random:
    """Draws uniform numbers on the generator's device and moves them to the images' device."""

    def __init__(self, generator: torch.Generator | None, device: torch.device):
        self.generator, self.device = generator, device

    def __call__(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        device = self.generator.device if self.generator is not None else self.device
        draw = torch.rand(*shape, generator=self.generator, device=device).to(self.device)
        return draw * (high - low) + low

    def some(self, count: int, probability: float) -> Tensor:
        """A random subset of `count` images, each with this probability: int64 [k]."""
        return torch.nonzero(self(count) < probability).flatten()


def premultiply(rgba: Tensor) -> Tensor:
    """Multiply colour by alpha: uint8 [B, H, W, 4] with straight alpha -> float32 [B, 4, H, W] in 0..1."""
    x = rgba.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
    x[:, :3] *= x[:, 3:]
    return x


def place(pre: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Resample premultiplied [B, 4, h, w] by affine maps [B, 2, 3] from output to input: [B, 4, size, size]."""
    grid = F.affine_grid(matrix, [pre.shape[0], 4, size, size], align_corners=False)
    return F.grid_sample(pre, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def affine_map(scale: Tensor, angle: Tensor, shear: Tensor, dx: Tensor, dy: Tensor, mirror: Tensor) -> Tensor:
    """Affine maps from output to input, float32 [B, 2, 3]: the object fills `scale` of the frame, centred at (dx, dy)
    in -1..1.
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    a, b = cos * mirror, (sin + shear * cos) * mirror
    c, d = -sin, cos - shear * sin
    return torch.stack([a, b, -(a * dx + b * dy), c, d, -(c * dx + d * dy)], 1).view(-1, 2, 3)


def plain_emoji(rgba: Tensor, size: int | None = None) -> Tensor:
    """The evaluation view, on white at scale 0.9: uint8 [B, H, W, 4] -> [B, 3, size, size]."""
    pre = premultiply(rgba)
    unit = torch.ones(len(pre), device=pre.device)
    zero = torch.zeros_like(unit)
    placed = place(pre, affine_map(unit * PLAIN_SCALE, zero, zero, zero, zero, unit), size or rgba.shape[1])
    return (placed[:, :3] + 1 - placed[:, 3:]).clamp_(0, 1)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images as a picture file stores them: float32 [B, 3, H, W] in 0..1 -> uint8 [B, H, W, 3]."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _colour_matrix(rand: Random, count: int, strength: float) -> tuple[Tensor, Tensor]:
    """Random hue, saturation, contrast and brightness as colour matrices [B, 3, 3] and biases [B, 3, 1]."""
    grey = torch.tensor(_LUMA, device=rand.device).expand(3, 3)
    angle = rand(count, 1, 1, low=-0.25, high=0.25) * strength
    # A rotation about the grey axis (Rodrigues) turns the hue and keeps greys.
    k = 1 / math.sqrt(3)
    cross = k * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=rand.device)
    hue = torch.cos(angle) * torch.eye(3, device=rand.device) + torch.sin(angle) * cross
    hue = hue + (1 - torch.cos(angle)) / 3
    saturation = 1 + rand(count, 1, 1, low=-0.7, high=0.6) * strength
    saturation[rand.some(count, 0.06 * strength)] = 0
    matrix = grey + saturation * (hue - grey @ hue)
    contrast = 1 + rand(count, 1, 1, low=-0.4, high=0.4) * strength
    bias = rand(count, 1, 1, low=-0.15, high=0.15) * strength + 0.5 * (1 - contrast)
    return matrix * contrast, bias.expand(count, 3, 1)


def recolour(rand: Random, pre: Tensor, strength: float) -> None:
    """Change hue, saturation, contrast and brightness of premultiplied drawings [B, 4, h, w] at random, in place."""
    matrix, bias = _colour_matrix(rand, len(pre), strength)
    flat = pre.view(len(pre), 4, -1)
    # The bias is multiplied by alpha too: the colours are premultiplied.
    colour = torch.baddbmm(bias * flat[:, 3:], matrix, flat[:, :3])
    flat[:, :3] = torch.minimum(colour.clamp_(min=0), flat[:, 3:])


def random_ground(rand: Random, count: int, size: int, strength: float) -> Tensor:
    """Random grounds [B, 3, size, size]: white, one colour, a gradient or soft noise, from a 4 x 4 grid of colours."""
    first, second = rand(count, 3, 1, 1), rand(count, 3, 1, 1)
    ramp = torch.linspace(0, 1, 4, device=rand.device)
    angle = rand(count, 1, 1, 1, high=2 * math.pi)
    along = (torch.cos(angle) * (ramp - 0.5) + torch.sin(angle) * (ramp.view(4, 1) - 0.5) + 0.5).clamp(0, 1)
    kind = rand(count, 1, 1, 1)
    grid = torch.where(kind < 0.55, first.expand(-1, 3, 4, 4), first + (second - first) * along)
    grid = torch.where(kind > 0.8, first + (rand(count, 3, 4, 4) - 0.5) * 0.8, grid)
    # Weak augmentation keeps the white ground of the evaluation view, strong augmentation keeps it in some images.
    grid = torch.where(rand(count, 1, 1, 1) < 1 - 0.7 * min(strength, 1.0), torch.ones_like(grid), grid)
    return F.interpolate(grid.clamp(0, 1), size=size, mode="bilinear", align_corners=True)


def _keep_contrast(ground: Tensor, placed: Tensor) -> Tensor:
    """Move the ground towards white or black in images whose object and ground are about equally bright."""
    luma = torch.tensor(_LUMA, device=placed.device).view(3, 1)
    mass = placed[:, 3].sum((1, 2)).clamp_min(1)
    object_luma = (placed[:, :3].sum((2, 3)) @ luma).squeeze(1) / mass
    ground_luma = (ground.mean((2, 3)) @ luma).squeeze(1)
    close = ((object_luma - ground_luma).abs() < 0.2).view(-1, 1, 1, 1)
    target = (object_luma < 0.55).to(ground).view(-1, 1, 1, 1)
    return torch.where(close, 0.3 * ground + 0.7 * target, ground)


def ink(rand: Random, placed: Tensor, strength: float) -> None:
    """Give some drawings a black outline and dark lines along their inner edges, in place."""
    some = rand.some(len(placed), 0.18 * strength)
    if not len(some):
        return
    x = placed[some]
    alpha = x[:, 3:]
    grown = F.max_pool2d(alpha, 3, 1, 1)
    grown = torch.where(rand(len(some), 1, 1, 1) < 0.5, F.max_pool2d(grown, 3, 1, 1), grown)
    luma = x[:, :3].mean(1, keepdim=True)
    edges = F.max_pool2d(luma, 3, 1, 1) + F.max_pool2d(-luma, 3, 1, 1)
    weight = rand(len(some), 1, 1, 1, high=3.0)
    x[:, :3] *= 1 - (edges * weight).clamp_(0, 1)
    # Black ink under the drawing adds alpha and no colour.
    x[:, 3:] = alpha + (1 - alpha) * grown
    # In some drawings the fill fades to white, which leaves line art.
    fade = (rand(len(some), 1, 1, 1) < 0.3).to(x) * rand(len(some), 1, 1, 1)
    x[:, :3] += (alpha * (1 - (edges * 3).clamp(0, 1)) - x[:, :3]) * fade
    placed[some] = x


def _finish(rand: Random, images: Tensor, strength: float) -> Tensor:
    """Bend the tones of all images; blur or sharpen, posterise, add noise to or erase parts of some; in place."""
    count, _, height, width = images.shape
    # x + k x (1 - x) bends the tones as a gamma does, without a power per pixel.
    images += rand(count, 1, 1, 1, low=-0.35, high=0.35) * strength * images * (1 - images)
    some = rand.some(count, 0.3 * strength)
    if len(some):
        x = images[some]
        soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        images[some] = x + (x - soft) * rand(len(some), 1, 1, 1, low=-1.0, high=1.2)
    some = rand.some(count, 0.1 * strength)
    if len(some):
        levels = torch.floor(rand(len(some), 1, 1, 1, low=2.0, high=6.0))
        images[some] = torch.round(images[some] * levels) / levels
    some = rand.some(count, 0.15 * strength)
    if len(some):
        noise = rand(len(some), 3, height, width, low=-0.5, high=0.5)
        images[some] += noise * rand(len(some), 1, 1, 1, high=0.25)
    some = rand.some(count, 0.2 * strength)
    if len(some):
        row = torch.arange(height, device=images.device).view(1, 1, -1, 1) / height
        column = torch.arange(width, device=images.device).view(1, 1, 1, -1) / width
        x, y = rand(len(some), 1, 1, 1), rand(len(some), 1, 1, 1)
        w, h = rand(len(some), 1, 1, 1, low=0.05, high=0.18), rand(len(some), 1, 1, 1, low=0.05, high=0.18)
        hole = ((row - y).abs() < h) & ((column - x).abs() < w)
        images[some] = torch.where(hole, rand(len(some), 3, 1, 1), images[some])
    return images.clamp_(0, 1)


def augment_emoji(
    rgba: Tensor,
    generator: torch.Generator | None = None,
    strength: float = 1.0,
    size: int | None = None,
    flip: bool = False,
) -> Tensor:
    """A random view of each drawing: uint8 [B, H, W, 4] -> [B, 3, size, size].

    strength : 0 is close to the plain view, 1 uses the full ranges. flip : mirror half of the images; off by default,
    because a mirrored arrow or hand has another caption.
    """
    if rgba.device.type == "cpu" and len(rgba) > _CPU_CHUNK:
        parts = rgba.split(_CPU_CHUNK)
        return torch.cat([augment_emoji(part, generator, strength, size, flip) for part in parts])
    rand = Random(generator, rgba.device)
    count, size = len(rgba), size or rgba.shape[1]
    pre = premultiply(rgba)
    recolour(rand, pre, strength)
    scale = PLAIN_SCALE + (rand(count, low=0.55, high=1.1) - PLAIN_SCALE) * strength
    room = (1 - scale).abs() + 0.1 * strength
    mirror = torch.ones(count, device=rgba.device)
    if flip:
        mirror = torch.where(rand(count) < 0.5, -mirror, mirror)
    affine = affine_map(
        scale,
        rand(count, low=-1, high=1) * strength * math.radians(25),
        rand(count, low=-0.15, high=0.15) * strength,
        rand(count, low=-1, high=1) * room,
        rand(count, low=-1, high=1) * room,
        mirror,
    )
    placed = place(pre, affine, size)
    ink(rand, placed, strength)
    ground = _keep_contrast(random_ground(rand, count, size, strength), placed)
    images = torch.addcmul(placed[:, :3], 1 - placed[:, 3:], ground)
    return _finish(rand, images, strength)


def corner_neighbour(images: Tensor, generator: torch.Generator | None = None, share: float = 0.4) -> Tensor:
    """Put another image of the batch into a corner of some images [B, 3, S, S], at a fifth to a third of the side; in
    place.
    """
    rand = Random(generator, images.device)
    side = images.shape[-1]
    some = rand.some(len(images), share)
    others = (rand(len(some)) * len(images)).long()
    sizes, corners = (rand(len(some), low=0.2, high=0.33) * side).long(), rand(len(some), 2) < 0.5
    small = images[others]
    for row, view, size, (right, low) in zip(
        some.tolist(), small, sizes.tolist(), corners.tolist(), strict=True
    ):
        left, top = (side - size if far else 0 for far in (right, low))
        reduced = F.interpolate(view[None], size=size, mode="area")[0]
        images[row, :, top : top + size, left : left + size] = reduced
    return images
