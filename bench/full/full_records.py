"""The records of reports of `microvlm-bench full` and `sizes`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.bench.records import Bar, Figure, ModelProvenance, Provenance
from microvlm.formats.documents import Count


class StreamProvenance(ModelProvenance, frozen=True, kw_only=True):
    """With what memory gives, GB/s by number of threads."""

    stream_gb_per_s: dict[str, Figure]


class Decoder(msgspec.Struct, frozen=True):
    """What was measured of the decoder. Memory is None where the system does not tell."""

    kernels: str
    prompt_tokens: Count
    prefill_tokens_per_s: Figure
    decode_tokens_per_s: Figure
    weight_bytes_per_token: Count
    decode_gb_per_s: Figure
    decode_roofline_share: Figure
    load_ms: Figure
    anonymous_of_model_bytes: Figure | None
    tokenizer_anonymous_bytes: Figure | None
    file_backed_bytes: Figure | None


class FullReport(msgspec.Struct, frozen=True):
    """The whole document of `full`."""

    full: Decoder
    bars: list[Bar]
    provenance: StreamProvenance


class BundleSize(msgspec.Struct, frozen=True):
    """One exported variant."""

    packing: str
    vocabulary: Count
    layers: Count
    slots: Count
    bundle_bytes: Count
    weight_bytes_per_token: Count


class SizesReport(msgspec.Struct, frozen=True):
    """The whole document of `sizes`."""

    preset: str
    bundles: Annotated[list[BundleSize], Meta(min_length=1)]
    """The others are compared with the first."""
    provenance: Provenance
