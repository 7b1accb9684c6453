"""The description of a lowered layer, which a bundle's manifest and a checkpoint's metadata hold by the layer's name.

Imports neither numpy nor torch.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.formats import documents
from microvlm.formats.documents import Size

LAYERS = "layers"
"""Key of the layers in the metadata of a checkpoint's weights; the value is JSON."""

HALF, HALF_EMBEDDING, FLOAT_EMBEDDING = "half", "half-embedding", "float-embedding"
DENSE_KINDS = ("dense-float16", "dense-float32")
"""Kinds without an operator of the table: float16, float32 that is not trained further, and trits in a float dtype."""


class LoweredLayer(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What it takes to build one lowered layer empty."""

    kind: Annotated[str, Meta(min_length=1, max_length=64)]
    """A storage kind of the table of operators, or that of a layer without one (`half`, `dense-float16`, ...).

    A newer package may store kinds that this one does not know; whoever builds the layer refuses them.
    """
    rows: Size
    """N, the layer's outputs."""
    columns: Size
    """K, the layer's inputs."""
    scale: Size | None = None
    """Number of weight scales: 1 for one a tensor, N for one a row; None for a layer without."""
    bias: bool | None = None


def parse_layers(text: str, origin: object) -> dict[str, LoweredLayer]:
    """Parse the metadata `LAYERS` of the file `origin`. Raises UserError."""
    return documents.parse(
        text, dict[str, LoweredLayer], f"{origin}, metadata '{LAYERS}'", "copy the checkpoint again"
    )
