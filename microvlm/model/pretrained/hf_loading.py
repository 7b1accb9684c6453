"""Loads Hugging Face weights into a MicroVLM: any ViT/DeiT encoder and any Qwen2/Llama decoder, strictly.

Reads only config.json and safetensors, so it needs no transformers and runs no code of a checkpoint. Raises UserError
for what the reference model would compute differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from math import ceil, prod
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.manifest import is_safe_name
from microvlm.formats.weight_shapes import weight_shapes
from microvlm.inputs.processor import TOKENIZER, Processor
from microvlm.model.checkpoint import WEIGHTS, read_tensors, read_weights_header, save_checkpoint
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.hf_config import read_json, text_config, vision_config
from microvlm.sources.model_source import INDEX, find_folder


class _Index(msgspec.Struct, frozen=True):
    """The file that says in which shard a tensor is."""

    weight_map: dict[str, str]


UNUSED_VISION_PREFIXES = (
    "pooler.",
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "embeddings.mask_token",
)
"""Key prefixes of heads that a feature extractor does not have."""

_VISION_LAYER = {"norm_before": "layernorm_before", "norm_after": "layernorm_after"}
_VISION_LAYER_OLD = _VISION_LAYER | {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "output": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_VISION_LAYER_NEW = _VISION_LAYER | {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_VISION_TOP = {
    "cls_token": "embeddings.cls_token",
    "distillation_token": "embeddings.distillation_token",
    "position_embeddings": "embeddings.position_embeddings",
    "patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def assemble(vision: str | Path, decoder: str | Path, base: MicroVLMConfig) -> MicroVLM:
    """Build a MicroVLM from two pretrained parts, each a directory or a hub id, with a new adapter and memory.

    `base` gives everything that the parts do not define: memory, weight widths, prompt, prefix tokens and SubLN (whose
    new norms start at 1). Raises UserError for what cannot be loaded exactly.
    """
    vision_directory, decoder_directory = find_folder(vision), find_folder(decoder)
    config = assembled_config(vision_directory, decoder_directory, base)
    shapes = weight_shapes(config)
    _require_weights(
        vision_directory, (shape for name, shape in shapes.items() if name.startswith("vision."))
    )
    _require_weights(
        decoder_directory,
        (
            shape
            for name, shape in shapes.items()
            if name.startswith(("decoder.", "embedding.")) and "sub_norm" not in name
        ),
    )
    model = MicroVLM(config)
    load_vision(model.vision, vision_directory)
    load_decoder(model, decoder_directory)
    model.memory_projection.initialise_from(model.decoder.layers)
    return model.eval()


def assemble_checkpoint(
    vision: str | Path, decoder: str | Path, base: MicroVLMConfig, directory: str | Path
) -> MicroVLM:
    """`assemble` a model and save it with the decoder's tokenizer, as a checkpoint to train, export and run.

    A missing image token is added, with the mean of all embeddings. Raises UserError before anything is written, also
    when the tokenizer lacks another token of `base.prompt`.
    """
    decoder_directory = find_folder(decoder)
    path = decoder_directory / TOKENIZER
    if not path.is_file():
        raise UserError(f"{path} is missing: the decoder's directory must hold its tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # tokenizers raises plain Exception, and panics of Rust as BaseException
        raise UserError(f"{path} is damaged: copy the decoder again.") from None
    if tokenizer.token_to_id(base.prompt.image_token) is None:
        tokenizer.add_special_tokens([base.prompt.image_token])
    model = assemble(vision, decoder_directory, base)
    grow_vocabulary(model, max(tokenizer.get_vocab().values()) + 1)
    processor = Processor(tokenizer, model.config)
    save_checkpoint(model, Path(directory), processor.save)
    model.directory = Path(directory)
    return model


def grow_vocabulary(model: MicroVLM, vocab_size: int) -> None:
    """Add embedding rows up to `vocab_size` tokens. Each new row is the mean of the old ones."""
    old = model.embedding.weight
    missing = vocab_size - old.shape[0]
    if missing <= 0:
        return
    mean = old.detach().mean(0, keepdim=True)
    model.embedding.weight = nn.Parameter(torch.cat([old.detach(), mean.expand(missing, -1)]))
    model.config = dataclasses.replace(
        model.config, text=dataclasses.replace(model.config.text, vocab_size=vocab_size)
    )


def assembled_config(vision: Path, decoder: Path, base: MicroVLMConfig) -> MicroVLMConfig:
    """`base` with the sizes of two Hugging Face directories. Sizes that `base` derived from its own follow them."""
    encoder, text = vision_config(vision), text_config(decoder, base.text.sub_norm)
    memory = base.memory
    if memory.code_size == base.text.hidden_size:
        memory = dataclasses.replace(memory, code_size=text.hidden_size)
    default_prefix = base.prefix_tokens == min(64, max(8, ceil(base.vision.num_patches / 8)))
    return dataclasses.replace(
        base,
        vision=encoder,
        text=text,
        memory=memory,
        prefix_tokens=0 if default_prefix else base.prefix_tokens,
    )


def load_vision(encoder: nn.Module, directory: Path) -> None:
    """Load the weights of a ViT/DeiT directory: a bare encoder, or a classifier with one. Raises UserError."""
    tensors, origin = _read_weights(directory)
    tensors = _without_prefix(tensors, ("vit.", "deit."))
    tensors = {key: value for key, value in tensors.items() if not key.startswith(UNUSED_VISION_PREFIXES)}
    is_old = any(key.startswith("encoder.layer.") for key in tensors)
    names = {key: _vision_name(key, is_old) for key in encoder.state_dict()}
    patches = tensors.get(_VISION_TOP["patch_embedding.weight"])
    if patches is not None:
        # A convolution over patches is a linear over flattened patches: channel, row, column.
        tensors[_VISION_TOP["patch_embedding.weight"]] = patches.flatten(1)
    _load(encoder, tensors, names, origin)


def load_decoder(model: MicroVLM, directory: Path) -> None:
    """Load decoder and embedding of a Qwen2/Llama directory; missing SubLN norms become ones. Raises UserError."""
    tensors, origin = _read_weights(directory)
    embedding = tensors.get("model.embed_tokens.weight")
    head = tensors.pop("lm_head.weight", None)
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise UserError(
            f"{origin}: 'lm_head.weight' differs from the embedding; only tied output heads are supported."
        )
    tensors = {key: value for key, value in tensors.items() if not key.endswith(".rotary_emb.inv_freq")}
    parts = nn.ModuleDict({"decoder": model.decoder, "embedding": model.embedding})
    names = {key: "model." + key.removeprefix("decoder.") for key in parts.state_dict()}
    names["embedding.weight"] = "model.embed_tokens.weight"
    for key, value in parts.state_dict().items():
        if key.endswith("sub_norm.weight"):
            tensors.setdefault(names[key], torch.ones_like(value))
    _load(parts, tensors, names, origin)


def _load(module: nn.Module, tensors: dict[str, Tensor], names: dict[str, str], origin: str) -> None:
    """Load every key of `module` from `tensors` by the names in `names`; errors use the file's names."""
    _name_first(set(names.values()) - set(tensors), origin, "lacks")
    _name_first(set(tensors) - set(names.values()), origin, "has an unexpected")
    for key, value in module.state_dict().items():
        tensor = tensors[names[key]]
        if tensor.shape != value.shape:
            raise UserError(
                f"{origin}: '{names[key]}' is {tuple(tensor.shape)}, "
                f"not {tuple(value.shape)} as its config.json says."
            )
        if not tensor.is_floating_point():
            raise UserError(
                f"{origin}: '{names[key]}' holds {tensor.dtype}; only float weights are supported."
            )
    module.load_state_dict({key: tensors[name] for key, name in names.items()})


def _name_first(keys: Iterable[str], origin: str, verb: str) -> None:
    ordered = sorted(keys)
    if ordered:
        raise UserError(
            f"{origin} {verb} '{ordered[0]}' ({len(ordered)} such keys): it does not fit its config.json."
        )


def _vision_name(key: str, is_old: bool) -> str:
    """Convert our key to the name in the hub's files (`is_old`), or to that of transformers 5."""
    if not key.startswith("layers."):
        return _VISION_TOP[key]
    _, index, part, leaf = key.split(".")
    layers, parts = ("encoder.layer", _VISION_LAYER_OLD) if is_old else ("layers", _VISION_LAYER_NEW)
    return f"{layers}.{index}.{parts[part]}.{leaf}"


def _without_prefix(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    for prefix in prefixes:
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _read_weights(directory: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a directory, and its name for error messages."""
    files, origin = _weight_files(directory)
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= read_tensors(path)[0]
    return tensors, origin


def _require_weights(directory: Path, shapes: Iterable[tuple[int, ...]]) -> None:
    """Raise UserError if tensors of these shapes have more than twice the weights that a directory stores.

    So no configuration takes memory that its files do not. Names and shapes are compared when the model is built.
    """
    files, origin = _weight_files(directory)
    stored = sum(
        prod(tensor.shape) for path in files for tensor in read_weights_header(path).tensors.values()
    )
    needed = sum(map(prod, shapes))
    if needed > 2 * stored:
        raise UserError(
            f"{origin} holds {stored:,} weights, and its config.json describes {needed:,}: copy the checkpoint again."
        )


def _weight_files(directory: Path) -> tuple[list[Path], str]:
    """The files with a directory's tensors (one file or shards), and a name for errors. Raises UserError."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS], str(directory / WEIGHTS)
    index = directory / INDEX
    if not index.is_file():
        has_pickle = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
        problem = "only pickled weights, which are never loaded: convert them to" if has_pickle else "no"
        raise UserError(f"{directory} has {problem} {WEIGHTS}.")
    names = set(read_json(index, _Index).weight_map.values())
    if any(not is_safe_name(name) or "/" in name for name in names):
        raise UserError(f"{index} does not map weights to files beside it: copy the checkpoint again.")
    return [directory / name for name in sorted(names)], str(index)
