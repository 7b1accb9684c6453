"""Checkpoints on disk: config.json and model.safetensors, written aside and renamed, loaded strictly. Never pickle."""

from __future__ import annotations

import json
import os
import shutil
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.op_table import MATMUL_BY_KIND
from microvlm.model.embedding import HalfEmbedding, PackedEmbedding, TiedEmbedding
from microvlm.model.linear import DenseTritLinear, HalfLinear, PackedLinear
from microvlm.model.microvlm import MicroVLM

WEIGHTS = "model.safetensors"
BUNDLED = ("nano",)
DENSE_DTYPES = {"dense-float16": torch.float16, "dense-float32": torch.float32}
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)


def resolve_checkpoint(source: str | Path) -> Path:
    """A bundled name, a directory or a hub id -> a directory. Raises UserError."""
    path = Path(source)
    if path.is_dir():
        return path
    if str(source) in BUNDLED:
        return Path(str(resources.files("microvlm").joinpath("checkpoints", str(source))))
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise UserError(
            f"'{source}' is no checkpoint: give a directory, a hub id (owner/name) or one of {', '.join(BUNDLED)}."
        )
    try:
        from huggingface_hub import snapshot_download

        # Pickled weights that a repository may hold beside the safetensors are not even downloaded.
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except ImportError:
        raise UserError(f"loading '{source}' from a hub needs: pip install 'microvlm[export]'.") from None
    except Exception as error:  # the hub client raises a dozen kinds; each means "could not be had"
        raise UserError(
            f"'{source}' could not be fetched from the hub ({type(error).__name__}): check the id and the network."
        ) from None


def load_checkpoint(source: str | Path) -> MicroVLM:
    """A MicroVLM with the stored weights, in evaluation mode. A missing or unexpected key is a UserError naming it."""
    directory = resolve_checkpoint(source)
    config = MicroVLMConfig.load(directory)
    if (directory / "manifest.json").is_file() and not (directory / WEIGHTS).is_file():
        raise UserError(
            f"{directory} is an exported bundle: run it, or give the checkpoint it was made from."
        )
    tensors, metadata = read_tensors(directory / WEIGHTS)
    # Shapes alone, because every value comes from the file: half a billion random numbers would be thrown away.
    with torch.device("meta"):
        model = MicroVLM(config)
        if "layers" in metadata:
            _build_described(model, metadata["layers"], directory / WEIGHTS)
    load_strictly(model, tensors, str(directory / WEIGHTS), assign=True)
    model.directory = directory
    return model.eval()


def save_checkpoint(model: MicroVLM, directory: Path) -> None:
    """Write `model` (latent or lowered) to a directory that does not exist yet, or holds a checkpoint to replace.

    Tokenizer and preprocessor go along from where the model was loaded, if it was.
    """
    if (directory / "config.json").exists():
        MicroVLMConfig.load(directory)  # refuses to replace what is not ours
    directory = Path(os.path.abspath(directory))
    aside = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        layers = describe_lowered(model)
        metadata = {"format": "pt", **({"layers": json.dumps(layers)} if layers else {})}
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(state, str(aside / WEIGHTS), metadata=metadata)
        model.config.save(aside)
        if model.directory is not None:
            _copy_processor(model.directory, aside)
        if directory.exists():
            for path in sorted(aside.iterdir()):
                os.replace(path, directory / path.name)
        else:
            os.rename(aside, directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{directory} cannot be written ({reason}): free space or choose another folder."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy_processor(origin: Path, target: Path) -> None:
    for name in PROCESSOR_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file and its metadata. Raises UserError when it is missing or damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the checkpoint again.") from None
    except (SafetensorError, OSError):
        raise UserError(f"{path} is damaged or not a safetensors file: copy the checkpoint again.") from None


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], origin: str, assign: bool = False) -> None:
    """Load every key or say which is missing, unexpected or of another shape (UserError).

    `assign` gives a model on the meta device its memory; otherwise values are copied into the model's own.
    """
    wanted = model.state_dict()
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing:
        raise UserError(
            f"{origin} lacks '{missing[0]}' ({len(missing)} missing keys): it is another model's file."
        )
    if unexpected:
        raise UserError(
            f"{origin} has an unexpected '{unexpected[0]}' ({len(unexpected)} such keys): it is another model's file."
        )
    for key, value in wanted.items():
        if tensors[key].shape != value.shape:
            raise UserError(
                f"'{key}' is {tuple(tensors[key].shape)} in {origin} and {tuple(value.shape)} in the configuration."
            )
        if tensors[key].is_floating_point() != value.is_floating_point():
            raise UserError(f"'{key}' is {tensors[key].dtype} in {origin} and should be {value.dtype}.")
    if assign:
        # Copies, because what safetensors returns is not aligned, and a matrix product may round by alignment.
        tensors = {key: tensors[key].to(value.dtype, copy=True) for key, value in wanted.items()}
    model.load_state_dict(tensors, assign=assign)


def describe_lowered(model: MicroVLM) -> dict[str, dict]:
    """name -> kind, rows, columns (and scale length) of every lowered layer: enough to build it empty."""
    layers: dict[str, dict] = {}
    config = model.config
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | DenseTritLinear):
            kind = (
                module.kind if module.kind != "dense" else f"dense-{str(module.weight.dtype).split('.')[-1]}"
            )
            layers[name] = {
                "kind": kind,
                "rows": module.rows,
                "columns": module.columns,
                "scale": module.scale.numel(),
                "bias": module.bias is not None,
            }
        elif isinstance(module, HalfLinear):
            shape = {"rows": module.rows, "columns": module.columns}
            layers[name] = {"kind": "half", **shape, "bias": module.bias is not None}
        elif isinstance(module, HalfEmbedding):
            layers[name] = {"kind": "half-embedding", **_shape_of(module.weight)}
        elif (
            isinstance(module, TiedEmbedding)
            and module.bits == 32
            and config.quantization.embedding_bits != 32
        ):
            layers[name] = {"kind": "float-embedding", **_shape_of(module.weight)}
    return layers


def _shape_of(weight: Tensor) -> dict[str, int]:
    return {"rows": weight.shape[0], "columns": weight.shape[1]}


def build_lowered(model: MicroVLM, layers: dict[str, dict]) -> None:
    """Give `model` the empty lowered layers that `describe_lowered` listed, ready for a strict load."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        built = _empty_layer(layer)
        if parent == "embedding" and isinstance(built, PackedLinear):
            model.set_submodule("embedding", PackedEmbedding(built))
        else:
            setattr(model.get_submodule(parent), leaf, built)


def _build_described(model: MicroVLM, description: str, path: Path) -> None:
    """`build_lowered` from a file's metadata. Raises UserError when it makes no sense."""
    try:
        build_lowered(model, json.loads(description))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        raise UserError(f"{path} lists layers that make no sense: copy the checkpoint again.") from None


def _empty_layer(layer: dict) -> nn.Module:
    kind, rows, columns = layer["kind"], layer["rows"], layer["columns"]
    bias = torch.zeros(rows) if layer.get("bias") else None
    if kind == "float-embedding":
        # Plain weights, without the straight-through rounding that the configuration trained with.
        wide = TiedEmbedding(0, 0, bits=32)
        wide.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)
        return wide
    if kind == "half-embedding":
        return HalfEmbedding(torch.zeros(rows, columns))
    if kind == "half":
        return HalfLinear(torch.zeros(rows, columns), bias)
    scale = torch.zeros(layer["scale"])
    if kind in DENSE_DTYPES:
        return DenseTritLinear(torch.zeros(rows, columns), scale, bias, DENSE_DTYPES[kind])
    if kind not in MATMUL_BY_KIND:
        raise UserError(f"layers are stored as '{kind}', which this version does not know; upgrade microvlm.")
    types = MATMUL_BY_KIND[kind].weight_types(rows, columns, scales=layer["scale"])
    tensors = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in types.items()
    }
    return PackedLinear(kind, rows, columns, tensors, bias)
