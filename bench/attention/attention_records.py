"""The records of a report of `microvlm-bench attention`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import MOST_COLUMNS, Figure, Interval, ModelProvenance
from microvlm.formats.documents import Count

MOST_CELLS, MOST_WORDS = 64, 256
"""Of a side of a map, and of an answer."""


class HeadAttention(msgspec.Struct, frozen=True):
    """One head, mean over pictures and text tokens; the memory's slot is masked but for `slot`."""

    mean: Figure
    """Attention to all prefix embeddings together."""
    max: Figure
    """Attention to the prefix embedding that gets most."""
    entropy: Figure
    """Of the attention over the prefix embeddings, nats."""
    relative_entropy: Figure
    """Entropy by that of an even one, ln k."""
    sparsity: Figure
    """Share of the weights on prefix embeddings below a tenth of an even one."""
    text: Figure
    """Attention to the prompt's own tokens."""
    slot: Figure
    """Attention to the memory's slot where it may be seen."""


class LayerAttention(msgspec.Struct, frozen=True):
    """One layer, by head. `divergence` is that of attention between two pictures, nats."""

    heads: Annotated[list[HeadAttention], Meta(min_length=1, max_length=4096)]
    picture_divergence: Figure


class Side(msgspec.Struct, frozen=True):
    """A model whose attention was read."""

    model: str
    decoder_bits: Figure | None
    embedding_bits: Figure | None
    layers: Annotated[list[LayerAttention], Meta(min_length=1, max_length=1024)]
    isotropy: Annotated[list[Isotropy], Meta(max_length=16)]


class Isotropy(msgspec.Struct, frozen=True):
    """Sliced Epps-Pulley statistic of one kind of features against evenly spread directions."""

    features: str
    samples: Count
    width: Count
    statistic: Figure
    null_mean: Figure
    null_95: Figure
    null_99: Figure
    p_value: Figure
    p_interval: Interval
    mean_length: Figure
    effective_rank: Figure


class SliceNull(msgspec.Struct, frozen=True):
    """The null of a single slice, for many samples."""

    mean: Figure
    quantile_95: Figure
    quantile_99: Figure


class Drift(msgspec.Struct, frozen=True):
    """Two-sample statistic of attention, and its p-value among swaps within pictures."""

    statistic: Figure
    null_mean: Figure
    p_value: Figure
    p_interval: Interval


class LayerDrift(msgspec.Struct, frozen=True):
    """Drift of one layer. Jensen-Shannon divergences are in nats, 0 to ln 2."""

    test: Drift
    p_holm: Figure
    """p-value that holds for all layers together."""
    divergence: Figure
    """Of the two models' attention to the same picture."""
    largest: Figure
    """Largest difference of a weight."""


class Comparison(msgspec.Struct, frozen=True):
    """The second model, and how far its attention is from the first's."""

    against: Side
    swaps: Count
    test: Drift
    layers: list[LayerDrift]


class WordMap(msgspec.Struct, frozen=True):
    """Where one word of an answer looked: shares of its attention, [rows, columns] of the picture."""

    word: str
    note: str
    """Attention to places and to what stands for the whole picture, in words."""
    weights: Annotated[
        list[Annotated[list[Annotated[float, Meta(ge=0, le=1)]], Meta(min_length=1, max_length=MOST_CELLS)]],
        Meta(min_length=1, max_length=MOST_CELLS),
    ]

    def __post_init__(self) -> None:
        if len({len(row) for row in self.weights}) > 1:
            raise ValueError("the rows of `weights` are of different lengths")

    @property
    def strongest(self) -> tuple[int, int]:
        """Row and column of the largest weight, the first of equal ones."""
        cells = [(row, column) for row, line in enumerate(self.weights) for column in range(len(line))]
        return max(cells, key=lambda cell: self.weights[cell[0]][cell[1]])

    @property
    def place(self) -> str:
        """Where in the picture the largest weight is, in words: "the top left"; "nowhere" for a map of zeros."""
        row, column = self.strongest
        if self.weights[row][column] == 0:
            return "nowhere"
        high = _third(row, len(self.weights), ("top", "", "bottom"))
        wide = _third(column, len(self.weights[0]), ("left", "", "right"))
        return f"the {' '.join(part for part in (high, wide) if part) or 'middle'}"


def _third(index: int, count: int, words: tuple[str, str, str]) -> str:
    """The word of the third in which the middle of cell `index` of `count` lies."""
    return words[min(2, int(3 * (index + 0.5) / count))]


class LookedAt(msgspec.Struct, frozen=True):
    """The answer to one picture of the package's own sets, and where each of its words looked."""

    picture: str
    right: str
    answer: str
    maps: Annotated[list[WordMap], Meta(max_length=MOST_WORDS)]


class AttentionReport(msgspec.Struct, frozen=True):
    """The whole document."""

    backend: str
    prompt: str
    pictures: Count
    source: str
    prefix_tokens: Count
    text_tokens: Count
    slices: Count
    draws: Count
    model: Side
    null: SliceNull
    provenance: ModelProvenance
    comparison: Comparison | None = None
    stretch: bool = False
    """Do maps cover the picture in its own shape, or a square with white beside it?"""
    examples: list[LookedAt] = []
    """Empty, too, in documents of older versions."""

    def __post_init__(self) -> None:
        sides = [self.model, *([self.comparison.against] if self.comparison else [])]
        if any(len(layer.heads) != len(side.layers[0].heads) for side in sides for layer in side.layers):
            raise ValueError("layers have different numbers of heads")
        if self.comparison and len(self.comparison.layers) != len(self.model.layers):
            raise ValueError("drift is given for another number of layers")

    @property
    def shown_heads(self) -> int:
        """Heads that a table shows beside each other."""
        return min(len(self.model.layers[0].heads), MOST_COLUMNS)
