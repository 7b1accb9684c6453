"""The layers of EfficientNet-Lite (Tan and Le 2019, arXiv 1905.11946, without attention and swish) as a table.

Imports no torch: configurations, files and modules are all held against it.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

STRIDE = 32
"""Pixels of the image's side for one place of the last feature map."""
WINDOW = 2
"""Places on a side of the square that one token describes."""
STEM_WIDTH, HEAD_WIDTH = 32, 1280
COLOURS = 3
"""Numbers of a place's mean colour."""
BYTE_ZERO, RELU_ZERO, LINEAR_ZERO = 127, 0, 128
"""The byte that means 0 in pixels, behind a ReLU6, and in the output of a linear convolution."""

_STAGES = (
    # repeats, kernel, stride, expansion, outputs
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Convolution(NamedTuple):
    """One convolution with its folded batch normalization, and the ReLU6 behind it if it has one."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    is_linear: bool
    """Whether no ReLU6 follows."""

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[outputs, inputs of a group, kernel, kernel]."""
        return (self.outputs, self.inputs // self.groups, self.kernel, self.kernel)


class Block(NamedTuple):
    """An inverted residual block: expand (if any), depthwise, project."""

    convolutions: tuple[Convolution, ...]
    has_shortcut: bool
    """Whether the block's input is added to its output."""


def blocks(width: float, depth: float) -> tuple[Block, ...]:
    """The blocks between stem and head at these multipliers: Lite0 has 1 and 1, Lite4 1.4 and 1.8."""
    result: list[Block] = []
    inputs = STEM_WIDTH
    for number, (repeats, kernel, stride, expansion, outputs) in enumerate(_STAGES):
        # Lite models scale neither the first nor the last stage in depth.
        is_fixed = number in (0, len(_STAGES) - 1)
        outputs = _rounded(outputs * width)
        for repeat in range(repeats if is_fixed else ceil(repeats * depth)):
            step = stride if repeat == 0 else 1
            result.append(_block(f"blocks.{len(result)}", inputs, outputs, kernel, step, expansion))
            inputs = outputs
    return tuple(result)


def stem() -> Convolution:
    """The first convolution, over pixels."""
    return Convolution("stem", 3, STEM_WIDTH, 3, 2, 1, False)


def head(width: float, depth: float) -> Convolution:
    """The last convolution, whose outputs are the features of a place."""
    return Convolution("head", blocks(width, depth)[-1].convolutions[-1].outputs, HEAD_WIDTH, 1, 1, 1, False)


def convolutions(width: float, depth: float) -> tuple[Convolution, ...]:
    """All convolutions in the order of the data path."""
    inner = [convolution for block in blocks(width, depth) for convolution in block.convolutions]
    return (stem(), *inner, head(width, depth))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis of `size`, as TensorFlow's SAME has them: an odd one comes after."""
    total = max((ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _block(name: str, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> Block:
    wide = inputs * expansion
    layers = [
        Convolution(f"{name}.depthwise", wide, wide, kernel, stride, wide, False),
        Convolution(f"{name}.project", wide, outputs, 1, 1, 1, True),
    ]
    if expansion > 1:
        layers.insert(0, Convolution(f"{name}.expand", inputs, wide, 1, 1, 1, False))
    return Block(tuple(layers), stride == 1 and inputs == outputs)


def _rounded(width: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth below."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
