"""A full-size bundle with random weights, of the size of Qwen2.5-0.5B. Made once and cached.

Speed and memory do not depend on the values of weights, so an untrained model is enough to measure them.
Needs torch and onnx, as an export does. `python -m microvlm.bench.full.random_bundle` makes one and prints its size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from microvlm.backends.resolve import BUNDLES, exporter_digest
from microvlm.bench.full.qwen_tokenizer import qwen_tokenizer
from microvlm.bench.speed.speed_bench import bytes_read_per_token
from microvlm.config import MicroVLMConfig
from microvlm.console import after_saving, note, print_json, run_click
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.bundle import is_intact
from microvlm.formats.weight_format import PACKING_HELP, WeightFormat
from microvlm.presets import preset
from microvlm.sizes.smaller import Smaller
from microvlm.sources.cache_directory import cache_directory, writable_cache
from microvlm.temporary_folder import temporary_folder

PRESET = "full"
EMBEDDING_BITS = 4


def random_full_bundle(
    log: Callable[[str], None] = lambda _: None,
    packing: str = "2bit",
    vocabulary: int | None = None,
    layers: int | None = None,
    slots: int | None = None,
) -> Path:
    """Ternary linears, int4 token table and head. The first call takes minutes and 6 GB.

    With `vocabulary` it has Qwen2.5's tokenizer cut to so many tokens, and needs npm once. `layers` of the decoder and
    `slots` of the memory: the preset's when left out. Raises UserError.
    """
    changes = (("v", vocabulary), ("l", layers), ("s", slots))
    cut = "".join(f"-{letter}{value}" for letter, value in changes if value is not None)
    name = f"{PRESET}-random-{exporter_digest()}-1.58bit-{packing}-e{EMBEDDING_BITS}{cut}"
    bundle = cache_directory() / BUNDLES / name
    if is_intact(bundle):
        return bundle
    writable_cache(BUNDLES)
    log(f"making a {PRESET} model with random weights in {bundle}, once")
    import torch

    from microvlm.exporters.bundle_writer import CheckFailed, export
    from microvlm.model.lowering import lower
    from microvlm.model.microvlm import MicroVLM

    weights = WeightFormat(packing=packing, embedding_bits=EMBEDDING_BITS)
    tokenizer = qwen_tokenizer() if vocabulary is not None else None
    torch.manual_seed(0)
    with temporary_folder(bundle) as folder:
        checkpoint = folder / PRESET
        lower(MicroVLM(_config(layers, slots)), weights).save_pretrained(checkpoint)
        if tokenizer is not None:
            _add_tokenizer(checkpoint, tokenizer)
        try:
            smaller = Smaller(vocabulary=vocabulary, costs=False)
            export(checkpoint, bundle, weights, smaller=smaller, force=bundle.exists(), log=log)
        except CheckFailed as failure:
            raise UserError(f"the random {PRESET} model cannot be exported here ({failure}).") from None
    return bundle


def _config(layers: int | None, slots: int | None) -> MicroVLMConfig:
    config = preset(PRESET)
    text = dataclasses.replace(config.text, num_hidden_layers=layers or config.text.num_hidden_layers)
    memory = dataclasses.replace(config.memory, slots=slots or config.memory.slots)
    return dataclasses.replace(config, text=text, memory=memory)


def _add_tokenizer(checkpoint: Path, origin: Path) -> None:
    from microvlm.inputs.processor import TOKENIZER, TOKENIZER_CONFIG, Processor
    from microvlm.inputs.tokenizer import LibraryTokenizer

    settings = documents.load(origin / TOKENIZER_CONFIG, dict[str, Any], f"delete {origin}")
    tokenizer = LibraryTokenizer.from_file(origin / TOKENIZER)
    processor = Processor(tokenizer, MicroVLMConfig.load(checkpoint), {TOKENIZER_CONFIG: settings})
    processor.save(checkpoint)


@click.command()
@click.option("--packing", default="2bit", show_default=True, help=PACKING_HELP)
@click.option("--vocabulary", type=int, help="Cut table and tokenizer to so many tokens; else no tokenizer.")
def command(packing: str, vocabulary: int | None) -> int:
    """Make the full-size bundle with random weights, and print where it is and what it weighs."""
    bundle = random_full_bundle(note, packing, vocabulary)
    files = [path.stat().st_size for path in bundle.rglob("*") if path.is_file()]
    facts = {"total_bytes": sum(files), "weight_bytes_per_token": bytes_read_per_token(bundle)}
    with after_saving():
        print_json({"bundle": str(bundle), **facts})
    return 0


if __name__ == "__main__":
    run_click(command)
