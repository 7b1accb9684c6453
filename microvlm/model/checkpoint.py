"""Checkpoints on disk: a folder with config.json and model.safetensors, loaded strictly, replaced as a whole.

Pickled weights are never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from microvlm.atomic_folder import INCOMPLETE, new_files
from microvlm.config import CONFIG, MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.formats.headers.safetensors_header import SafetensorsHeader, read_header
from microvlm.formats.lowered_layer import LAYERS, LoweredLayer
from microvlm.formats.op_table import MATMUL_BY_KIND
from microvlm.formats.packed_bytes import is_packed
from microvlm.formats.stored_tensors import read_checkpoint
from microvlm.formats.weight_shapes import FLOAT, TensorType, compare_types
from microvlm.inputs.processor import GENERATION, PREPROCESSOR, TOKENIZER, TOKENIZER_CONFIG
from microvlm.inputs.tokenizer_tables import TABLES
from microvlm.model.embedding import HalfEmbedding, PackedEmbedding, TiedEmbedding
from microvlm.model.initial_values import empty_modules
from microvlm.model.linear import DenseTritLinear, HalfLinear, PackedLinear
from microvlm.model.microvlm import MicroVLM
from microvlm.sources.model_source import WEIGHTS, find_model
from microvlm.temporary_folder import recover

DENSE_DTYPES = {"dense-float16": torch.float16, "dense-float32": torch.float32}
PROCESSOR_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    PREPROCESSOR,
    GENERATION,
)
HEADS = "training_heads.safetensors"
"""Heads that exist in training only, so that another run can go on with them. Nothing else reads them."""
CHECKPOINT_FILES = frozenset({CONFIG, WEIGHTS, "training.json", HEADS, INCOMPLETE, TABLES, *PROCESSOR_FILES})
"""Names of the files that a checkpoint may have; a folder with others in it is never replaced as a whole."""


def resolve_checkpoint(source: str | os.PathLike[str]) -> Path:
    """The folder of the checkpoint that `source` means (`find_model`). Raises UserError, also for a bundle."""
    return find_model(source, "checkpoint").folder


def load_checkpoint(source: str | os.PathLike[str]) -> MicroVLM:
    """A MicroVLM with the stored weights, in evaluation mode.

    Raises UserError for a damaged checkpoint, for missing or unexpected keys, which it names, and for a checkpoint that
    is replaced meanwhile.
    """
    directory = resolve_checkpoint(source)
    identities = _identities(directory)
    config = MicroVLMConfig.load(directory)
    path = directory / WEIGHTS
    # Before a module is built: its sizes are the configuration's alone.
    _, layers = read_checkpoint(path, config)
    tensors, _ = read_tensors(path)
    check_packed(tensors, layers, path)
    if _identities(directory) != identities:
        raise UserError(f"{directory} was replaced while it was read: load it again.")
    # Shapes alone, because every value comes from the file: half a billion random numbers would be thrown away.
    with empty_modules():
        model = MicroVLM(config)
        build_lowered(model, layers)
    load_strictly(model, tensors, str(path), assign=True)
    model.directory = directory
    return model.eval()


def _identities(directory: Path) -> list[tuple[int, ...]]:
    """Facts of the file system about configuration and weights, which change when the files do."""
    paths = [path for path in (directory / CONFIG, directory / WEIGHTS) if path.exists()]
    return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)]


def save_checkpoint(model: MicroVLM, directory: Path, complete: Callable[[Path], None] | None = None) -> None:
    """Write `model` (with latent weights or lowered) as the checkpoint `directory`, new or in place of an old one.

    Tokenizer and preprocessor are copied from where the model was loaded, if it was; `complete` may write further files
    into the folder that it is given. All files change at the end: together where the folder holds nothing but files of
    a checkpoint (`new_files`). Other files are not touched.

    Raises UserError when the folder cannot be written, or holds another model's config.json.
    """
    with new_checkpoint(directory) as folder:
        write_tensors(model.state_dict(), folder / WEIGHTS, weights_metadata(describe_lowered(model)))
        model.config.save(folder)
        if model.directory is not None:
            _copy_processor(model.directory, folder)
        if complete is not None:
            complete(folder)


@contextmanager
def new_checkpoint(directory: Path) -> Iterator[Path]:
    """Yield an empty folder whose files become the checkpoint `directory`, as `save_checkpoint` describes.

    Raises UserError when the folder cannot be written, or holds another model's config.json.
    """
    directory = Path(os.path.abspath(directory))
    recover(directory)
    if (directory / CONFIG).exists() and not (directory / INCOMPLETE).exists():
        MicroVLMConfig.load(directory)  # refuses to replace what is not ours
    with new_files(directory, CHECKPOINT_FILES) as folder:
        yield folder


def weights_metadata(layers: Mapping[str, LoweredLayer]) -> dict[str, str]:
    """The metadata of a checkpoint's weights with these lowered layers."""
    return {"format": "pt", **({LAYERS: json.dumps(msgspec.to_builtins(layers))} if layers else {})}


def _copy_processor(origin: Path, target: Path) -> None:
    for name in PROCESSOR_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions that the umask leaves. Raises OSError.

    safetensors alone makes files that only their owner can read, and reports a full disk as SafetensorError.
    """
    path.touch()
    mode = path.stat().st_mode & 0o7777
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(path), metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(str(error)) from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(every tensor of a safetensors file by name, its metadata). Raises UserError when it is missing or damaged."""
    header = read_weights_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in header.tensors}, header.metadata
    except (SafetensorError, OSError):
        raise UserError(f"{path} is damaged or not a safetensors file: copy the checkpoint again.") from None


def read_weights_header(path: Path) -> SafetensorsHeader:
    """The header of a checkpoint's weights. Raises UserError when the file is missing or damaged."""
    try:
        return read_header(path, "copy the checkpoint again")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the checkpoint again.") from None


def check_packed(tensors: Mapping[str, Tensor], layers: Mapping[str, LoweredLayer], origin: object) -> None:
    """Raise UserError for a lowered layer with bytes that no packing writes, or values of trits that are none."""
    for name, layer in layers.items():
        op = MATMUL_BY_KIND.get(layer.kind)
        if op is not None:
            right = is_packed(op, tensors[f"{name}.packed"].numpy())
        elif layer.kind in DENSE_DTYPES:
            weight = tensors[f"{name}.weight"]
            right = bool(((weight == 0) | (weight.abs() == 1)).all())
        else:
            continue
        if not right:
            raise UserError(
                f"{origin} is damaged: {quote(name)} has weights that its storage, {layer.kind}, does not have; "
                "copy the checkpoint again."
            )


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], origin: str, assign: bool = False) -> None:
    """Load every tensor of `model` from `tensors`, which were read from `origin`.

    `assign` gives a model on the meta device its memory; otherwise values are copied into the model's own tensors.

    Raises UserError naming a key that is missing, unexpected, or of another shape or kind.
    """
    state = model.state_dict()
    compare_types(_torch_types(state), _torch_types(tensors), origin)
    if assign:
        # Copies, because what safetensors returns is not aligned, and a matrix product may round by alignment.
        tensors = {key: tensors[key].to(value.dtype, copy=True) for key, value in state.items()}
    model.load_state_dict(tensors, assign=assign)


def _torch_types(tensors: Mapping[str, Tensor]) -> dict[str, TensorType]:
    return {
        name: TensorType(
            tuple(tensor.shape),
            FLOAT if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch."),
        )
        for name, tensor in tensors.items()
    }


def describe_lowered(model: MicroVLM) -> dict[str, LoweredLayer]:
    """Describes every lowered layer for `build_lowered`, by name: kind, rows, columns and, if it has them, scale length
    and bias."""
    layers: dict[str, LoweredLayer] = {}
    config = model.config
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | DenseTritLinear):
            kind = (
                module.kind if module.kind != "dense" else f"dense-{str(module.weight.dtype).split('.')[-1]}"
            )
            layers[name] = LoweredLayer(
                kind=kind,
                rows=module.rows,
                columns=module.columns,
                scale=module.scale.numel(),
                bias=module.bias is not None,
            )
        elif isinstance(module, HalfLinear):
            layers[name] = LoweredLayer(
                kind="half", rows=module.rows, columns=module.columns, bias=module.bias is not None
            )
        elif isinstance(module, HalfEmbedding):
            layers[name] = _table("half-embedding", module.weight)
        elif (
            isinstance(module, TiedEmbedding)
            and module.bits == 32
            and config.quantization.embedding_bits != 32
        ):
            layers[name] = _table("float-embedding", module.weight)
    return layers


def _table(kind: str, weight: Tensor) -> LoweredLayer:
    return LoweredLayer(kind=kind, rows=weight.shape[0], columns=weight.shape[1])


def build_lowered(model: MicroVLM, layers: Mapping[str, LoweredLayer]) -> None:
    """Put the empty lowered layers that `describe_lowered` listed into `model`, ready for a strict load."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        module = _empty_layer(layer)
        if parent == "embedding" and isinstance(module, PackedLinear):
            model.set_submodule("embedding", PackedEmbedding(module))
        else:
            setattr(model.get_submodule(parent), leaf, module)


def _empty_layer(layer: LoweredLayer) -> nn.Module:
    kind, rows, columns = layer.kind, layer.rows, layer.columns
    bias = torch.zeros(rows) if layer.bias else None
    if kind == "float-embedding":
        # Plain weights, without the straight-through rounding that the configuration trained with.
        embedding = TiedEmbedding(0, 0, bits=32)
        embedding.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)
        return embedding
    if kind == "half-embedding":
        return HalfEmbedding(torch.zeros(rows, columns))
    if kind == "half":
        return HalfLinear(torch.zeros(rows, columns), bias)
    scales = layer.scale or 1
    if kind in DENSE_DTYPES:
        return DenseTritLinear(torch.zeros(rows, columns), torch.zeros(scales), bias, DENSE_DTYPES[kind])
    if kind not in MATMUL_BY_KIND:
        raise UserError(f"layers are stored as '{kind}', which this version does not know; upgrade microvlm.")
    types = MATMUL_BY_KIND[kind].weight_types(rows, columns, scales=scales)
    tensors = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in types.items()
    }
    return PackedLinear(kind, rows, columns, tensors, bias)
