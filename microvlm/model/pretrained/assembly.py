"""Assembles a MicroVLM from a pretrained encoder and a pretrained decoder, with a new adapter and memory.

The weights of the parts keep their precision and are copied tensor by tensor. No code of a checkpoint is run. Raises
UserError for what the reference model would compute differently, before anything is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from microvlm.config import MicroVLMConfig, QuantizationConfig
from microvlm.formats.lowered_layer import LoweredLayer
from microvlm.formats.weight_shapes import FLOAT, TensorType, compare_types, stored_types
from microvlm.inputs.processor import TOKENIZER, Processor
from microvlm.inputs.processor_files import GENERATION, TOKENIZER_CONFIG, default_documents
from microvlm.inputs.tokenizer import load_tokenizer
from microvlm.model.adapter import Adapter, GridAdapter
from microvlm.model.checkpoint import (
    WEIGHTS,
    build_lowered,
    load_strictly,
    new_checkpoint,
    weights_metadata,
)
from microvlm.model.initial_values import empty_modules
from microvlm.model.linear import linear_factory
from microvlm.model.memory_modules import MemoryEncoder, MemoryProjection, ScopeDetector
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.decoder_tokenizer import DecoderTokenizer, read_decoder_tokenizer
from microvlm.model.pretrained.gguf_weights import gguf_weights
from microvlm.model.pretrained.hf_config import BitNet, bitnet_storage
from microvlm.model.pretrained.part_tensors import (
    checkpoint_vision_tensors,
    decoder_tensors,
    vision_tensors,
)
from microvlm.model.pretrained.parts import Part, find_part
from microvlm.model.pretrained.spelled_names import NAMES, read_names, spell_names
from microvlm.model.pretrained.stored_weights import folder_weights
from microvlm.model.tensor_writer import LazyTensor, write_lazily
from microvlm.sources.foreign_models import OURS

Source = str | os.PathLike[str] | Part


class AssembledWeights(NamedTuple):
    """The weights of an assembled model, most of them still in the files of its parts."""

    config: MicroVLMConfig
    tensors: dict[str, LazyTensor]
    layers: dict[str, LoweredLayer]
    """The layers that are stored packed, those of a BitNet decoder."""


def assemble(vision: Source, decoder: Source, base: MicroVLMConfig, seed: int | None = None) -> MicroVLM:
    """Build a MicroVLM in memory from two parts, each a folder, a hub id or (the decoder) a GGUF file.

    `base` gives everything that the parts do not define: memory, weight widths, prompt, prefix tokens and SubLN (whose
    new norms start at 1). `seed` draws the new parts; None takes torch's generator as it is. Names of an encoder's
    classes are drawn too: only `assemble_checkpoint` has a tokenizer to spell them with. Raises UserError.
    """
    weights = assembled_weights(find_part(vision, "vision"), find_part(decoder, "decoder"), base, seed=seed)
    with empty_modules():
        model = MicroVLM(weights.config)
        build_lowered(model, weights.layers)
    tensors = {name: tensor.read() for name, tensor in weights.tensors.items()}
    load_strictly(model, tensors, "the parts", assign=True)
    return model.eval()


def assemble_checkpoint(
    vision: Source,
    decoder: Source,
    base: MicroVLMConfig,
    directory: str | Path,
    *,
    template: str | None = None,
    seed: int = 0,
    written: Callable[[str, int], None] | None = None,
) -> AssembledWeights:
    """Write a checkpoint to train, export and run, with the decoder's tokenizer and prompt -> what was written.

    As `assemble`, but `base.prompt` is replaced by the decoder's own (`prompts.derive_prompt`), where `template` takes
    the place of its chat template. A missing image token is added, with the mean of all embeddings. Names of an
    encoder's classes are spelled in the decoder's tokens (`spelled_names`). `written` is told the name of each tensor
    and how many there are.

    Raises UserError before anything is written, also when `directory` holds what is no checkpoint.
    """
    encoder, text = find_part(vision, "vision"), find_part(decoder, "decoder")
    tokenizer = read_decoder_tokenizer(text.files, template)
    base = dataclasses.replace(base, prompt=tokenizer.prompt)
    weights = assembled_weights(encoder, text, base, tokenizer.vocab_size, seed)
    with new_checkpoint(Path(directory)) as folder:
        weights.config.save(folder)
        processor = _save_processor(tokenizer, weights.config, folder)
        if weights.config.vision.name_pieces:
            weights.tensors[NAMES] = _spelled_names(weights, encoder.folder, processor)
        count = len(weights.tensors)
        write_lazily(
            weights.tensors,
            folder / WEIGHTS,
            weights_metadata(weights.layers),
            None if written is None else lambda name: written(name, count),
        )
    return weights


def assembled_weights(
    encoder: Part, decoder: Part, base: MicroVLMConfig, vocab_size: int = 0, seed: int | None = None
) -> AssembledWeights:
    """The weights of both parts under the model's names, and new ones for the rest; at least `vocab_size` tokens."""
    bitnet = None if decoder.gguf is not None else bitnet_storage(decoder.folder)
    config = assembled_config(encoder, decoder, base, bitnet)
    if encoder.family == OURS:
        vision = checkpoint_vision_tensors(encoder.folder)
    else:
        vision = vision_tensors(encoder.folder, config)
    stored = (
        folder_weights(decoder.folder) if decoder.gguf is None else gguf_weights(decoder.gguf, config.text)
    )
    tensors, layers = decoder_tensors(stored, config, bitnet)
    if vocab_size > config.text.vocab_size:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size))
        tensors["embedding.weight"] = _with_rows(tensors["embedding.weight"], vocab_size)
    biases = [
        tensors.get(f"decoder.layers.{n}.self_attn.k_proj.bias") for n in range(config.text.num_hidden_layers)
    ]
    new = new_parts(config, [None if bias is None else bias.read() for bias in biases], seed)
    tensors |= vision | {name: LazyTensor(tuple(t.shape), t.dtype, t.clone) for name, t in new.items()}
    compare_types(stored_types(config, layers, "the parts"), _types(tensors), "the parts")
    return AssembledWeights(config, tensors, layers)


def assembled_config(
    encoder: Part, decoder: Part, base: MicroVLMConfig, bitnet: BitNet | None = None
) -> MicroVLMConfig:
    """`base` with the sizes of two parts. Sizes that `base` derived from its own follow them."""
    vision, text = encoder.vision_config(), decoder.text_config(base.text.sub_norm)
    memory = base.memory
    if memory.code_size == base.text.hidden_size:
        memory = dataclasses.replace(memory, code_size=text.hidden_size)
    # A convolutional encoder gives as many embeddings as it has windows and pieces of a name.
    default_prefix = vision.is_convolutional or base.prefix_tokens == min(
        64, max(8, ceil(base.vision.num_patches / 8))
    )
    quantization = base.quantization
    if bitnet is not None:
        quantization = dataclasses.replace(quantization, decoder_bits=1.58)
    return dataclasses.replace(
        base,
        vision=vision,
        text=text,
        memory=memory,
        quantization=quantization,
        prefix_tokens=0 if default_prefix else base.prefix_tokens,
    )


def new_parts(
    config: MicroVLMConfig, key_biases: list[Tensor | None], seed: int | None = None
) -> dict[str, Tensor]:
    """The tensors of the parts that no pretrained model has: adapter, memory and scope detector, float32.

    `key_biases`: k_proj's of each decoder layer, or None. The same `seed` gives the same numbers.
    """
    widths: QuantizationConfig = config.quantization
    ternary, eight = linear_factory(widths.decoder_bits), linear_factory(widths.vision_bits)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        parts = nn.ModuleDict(
            {
                "adapter": (GridAdapter if config.vision.is_convolutional else Adapter)(config, eight),
                "memory_encoder": MemoryEncoder(config, ternary),
                "memory_projection": (projection := MemoryProjection(config, eight)),
                "scope": ScopeDetector(config, eight),
            }
        )
        projection.initialise_from(key_biases)
    prior = torch.zeros(config.memory.slots, config.memory.code_size)
    return {**parts.state_dict(), "memory_prior": prior}


def _spelled_names(weights: AssembledWeights, folder: Path, processor: Processor) -> LazyTensor:
    """The names of the classes of the encoder in `folder`, in the decoder's tokens."""
    drawn, pieces = weights.tensors[NAMES], weights.config.vision.name_pieces
    table = weights.tensors["embedding.weight"]
    return LazyTensor(
        drawn.shape, drawn.dtype, lambda: spell_names(read_names(folder), pieces, processor, table.read())
    )


def _save_processor(tokenizer: DecoderTokenizer, config: MicroVLMConfig, folder: Path) -> Processor:
    """Write the tokenizer's files into a new checkpoint, whose prompt they must be able to encode. Raises UserError."""
    (folder / TOKENIZER).write_bytes(tokenizer.document)
    loaded = load_tokenizer(folder)
    pad_id = loaded.token_to_id(config.prompt.pad_token) or 0
    documents = default_documents(config, tokenizer.end_ids[0], pad_id)
    documents[GENERATION]["eos_token_id"] = tokenizer.end_ids
    documents[TOKENIZER_CONFIG] |= tokenizer.config
    processor = Processor(loaded, config, documents)
    processor.prompt_ids(config.prompt.caption_prompt, images=1)
    processor.save(folder)
    return processor


def _with_rows(embedding: LazyTensor, count: int) -> LazyTensor:
    """An embedding with `count` rows; each new one is the mean of the old ones."""
    return LazyTensor((count, embedding.shape[1]), embedding.dtype, partial(_grown, embedding, count))


def _grown(embedding: LazyTensor, count: int) -> Tensor:
    old = embedding.read()
    mean = old.mean(0, keepdim=True, dtype=torch.float32).to(old.dtype)
    return torch.cat([old, mean.expand(count - old.shape[0], -1)])


def _types(tensors: Mapping[str, LazyTensor]) -> dict[str, TensorType]:
    return {
        name: TensorType(
            tensor.shape,
            FLOAT if tensor.dtype.is_floating_point else str(tensor.dtype).removeprefix("torch."),
        )
        for name, tensor in tensors.items()
    }
