"""A `full` bundle with random weights: Qwen2.5-0.5B's size without its training. Made once, kept in the cache.

Speed and memory do not depend on the values of weights, so a full-size model can be measured where none can be had.
Needs torch and onnx, as an export does.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from microvlm.backends.resolve import cache_directory, is_bundle, open_bundle
from microvlm.errors import UserError

PRESET = "full"
EMBEDDING_BITS = 4


def random_full_bundle(
    log: Callable[[str], None] = lambda _: None, packing: str = "2bit", vocabulary: int | None = None
) -> Path:
    """Ternary linears, int4 token table and head; `vocabulary` None is Qwen's whole one, of 151,936.

    The first call takes minutes and 6 GB. Raises UserError.
    """
    version = importlib.metadata.version("microvlm")
    size = "" if vocabulary is None else f"-v{vocabulary}"
    name = f"{PRESET}-random-{version}-1.58bit-{packing}-e{EMBEDDING_BITS}{size}"
    bundle = cache_directory() / "bundles" / name
    if _is_whole(bundle):
        return bundle
    log(f"making a {PRESET} model with random weights in {bundle}, once")
    import torch

    from microvlm.config import preset
    from microvlm.exporters.bundle import CheckFailed, export
    from microvlm.lowering import WeightFormat, lower
    from microvlm.model import MicroVLM

    weights = WeightFormat(packing=packing, embedding_bits=EMBEDDING_BITS)
    config = preset(PRESET)
    if vocabulary is not None:
        config = replace(config, text=replace(config.text, vocab_size=vocabulary))
    bundle.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        checkpoint = Path(folder) / PRESET
        lower(MicroVLM(config), weights).save_pretrained(checkpoint)
        try:
            export(checkpoint, bundle, weights, force=bundle.exists(), log=log)
        except CheckFailed as failure:
            raise UserError(f"the random {PRESET} model cannot be exported here ({failure}).") from None
    return bundle


def _is_whole(bundle: Path) -> bool:
    try:
        return is_bundle(bundle) and bool(open_bundle(bundle))
    except UserError:
        return False
