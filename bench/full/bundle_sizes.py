"""`microvlm-bench sizes`: bytes on disk of the full size, and what fewer tokens, layers and memory slots save.

Bundles with random weights are exported and their files counted: sizes do not depend on the values of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from microvlm.bench.full.random_bundle import PRESET, random_full_bundle
from microvlm.bench.provenance import describe_model, provenance
from microvlm.bench.speed.speed_bench import bytes_read_per_token
from microvlm.config import MicroVLMConfig

Variant = dict[str, Any]
VARIANTS: tuple[Variant, ...] = (
    {},
    {"packing": "base3"},
    {"vocabulary": 50_000},
    {"vocabulary": 50_000, "layers": 20},
    {"vocabulary": 50_000, "layers": 20, "slots": 256},
    {"vocabulary": 50_000, "layers": 20, "slots": 256, "packing": "base3"},
)
"""Each is exported on its own; what is not named is as in the preset."""


def run(progress: Callable[[str], None], variants: Sequence[Variant] = VARIANTS) -> dict[str, Any]:
    """The document of `--json`. Minutes and 6 GB a variant that is not in the cache. Raises UserError."""
    bundles = [random_full_bundle(progress, **variant) for variant in variants]
    rows = [_measure(bundle, variant) for bundle, variant in zip(bundles, variants, strict=True)]
    facts = provenance(describe_model(bundles[0]), None)
    return {"report": "sizes", "preset": PRESET, "bundles": rows, "provenance": facts}


def _measure(bundle: Path, variant: Variant) -> dict[str, Any]:
    config = MicroVLMConfig.load(bundle)
    return {
        "packing": variant.get("packing", "2bit"),
        "vocabulary": config.text.vocab_size,
        "layers": config.text.num_hidden_layers,
        "slots": config.memory.slots,
        "bundle_bytes": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        "weight_bytes_per_token": bytes_read_per_token(bundle),
    }
