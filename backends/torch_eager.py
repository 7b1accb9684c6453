"""Backend `torch`: eager PyTorch on a checkpoint or on the bytes of a bundle. Integers are unpacked once, at load."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from microvlm.backends.base import Backend, LoadedRuntime
from microvlm.backends.threads import pool_threads
from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters.contract import require_graphs
from microvlm.formats.bundle import BundleFiles
from microvlm.sources.model_source import find_model

if TYPE_CHECKING:
    from torch import Tensor

    from microvlm.model.microvlm import MicroVLM


class TorchBackend(Backend):
    name = "torch"
    libraries = ("torch", "onnx", "microvlm.model.torch_runtime")

    def unavailable(self) -> str | None:
        missing = importlib.util.find_spec("torch") is None
        return "torch is not installed; pip install 'microvlm[export]'." if missing else None

    def load(
        self,
        source: str | Path,
        threads: int | None = None,
        device: str = "cpu",
        verify: bool | None = None,
        **options: Any,
    ) -> LoadedRuntime:
        """See `Backend.load`. `device`: a torch device. `threads` sets torch's threads for the whole process."""
        import torch

        from microvlm.model.torch_runtime import TorchRuntime

        if options:
            raise UserError(f"backend 'torch' has no option '{next(iter(options))}'.")
        # PyTorch counts cores and knows no quota; where it cannot start a thread it ends the program.
        count = pool_threads(threads)
        if threads is not None or count < torch.get_num_threads():
            torch.set_num_threads(count)
        found = find_model(source)
        is_bundle = found.kind == "bundle"
        model = load_bundle(found.folder, verify) if is_bundle else _load_checkpoint(found.folder)
        try:
            return TorchRuntime(model, device)
        except (RuntimeError, AssertionError):  # torch raises either for a missing device
            raise UserError(f"device '{device}' is not available here: choose cpu.") from None


def load_bundle(directory: Path, verify: bool | None = None) -> MicroVLM:
    """The lowered model whose weights are the initializers of a bundle's graphs. Raises UserError for any that is
    missing, superfluous or of another shape."""
    if importlib.util.find_spec("onnx") is None:
        raise UserError("backend 'torch' reads a bundle with onnx; pip install 'microvlm[export]'.")
    from microvlm.formats.stored_tensors import read_bundle
    from microvlm.model.checkpoint import build_lowered, check_packed, load_strictly
    from microvlm.model.initial_values import empty_modules
    from microvlm.model.microvlm import MicroVLM

    files = BundleFiles(directory, verify)
    manifest = files.manifest
    config = MicroVLMConfig.load(directory)
    # Before memory is taken: the sizes of a module are the configuration's alone.
    require_graphs(config, manifest.graphs, directory)
    read_bundle(directory, manifest, config)
    tensors = _initializers(files)
    files.require_unchanged(manifest.files)
    check_packed(tensors, manifest.lowered, directory)
    with empty_modules():
        model = MicroVLM(config)
        build_lowered(model, manifest.lowered)
    load_strictly(model, tensors, str(directory), assign=True)
    model.directory = directory
    return _unpacked(model)


def _load_checkpoint(source: str | Path) -> MicroVLM:
    from microvlm.formats.weight_format import WeightFormat
    from microvlm.model.checkpoint import load_checkpoint
    from microvlm.model.lowering import lower

    model = load_checkpoint(source)
    widths = model.config.quantization
    if widths.is_ternary and widths.vision_bits == 8 and widths.embedding_bits == 8:
        # Float weights would be rounded again in every call, to the same values.
        model = lower(model, WeightFormat())
    return _unpacked(model)


def _unpacked(model: MicroVLM) -> MicroVLM:
    from microvlm.model.linear import PackedLinear

    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.integers()
    return model.eval().requires_grad_(False)


def _read_external(place: Any, tensor: Any, files: BundleFiles, graph: str) -> None:
    """Fill `tensor` from the data file of `graph` that `place` names. Raises UserError for any other file.

    onnx's own reader refuses every link, also those of the hub's cache.
    """
    name = (PurePosixPath(graph).parent / place.location).as_posix()
    if name not in files.data_files[graph]:
        raise UserError(
            f"{files.folder / graph} names weights outside of its bundle: copy or export the bundle again."
        )
    with (files.folder / name).open("rb") as stream:
        rest = os.fstat(stream.fileno()).st_size - stream.seek(place.offset or 0)
        tensor.raw_data = stream.read(rest if place.length is None else min(rest, place.length))
    tensor.data_location = type(tensor).DEFAULT


def _initializers(files: BundleFiles) -> dict[str, Tensor]:
    """Every initializer of the graphs, and the memory's prior. A name in two graphs must hold the same bytes."""
    import onnx
    import torch
    from onnx import external_data_helper, numpy_helper
    from safetensors.torch import load_file

    tensors = load_file(files.folder / "memory_prior.safetensors")
    for name in files.data_files:
        path = files.folder / name
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
            for tensor in graph.initializer:
                if external_data_helper.uses_external_data(tensor):
                    _read_external(external_data_helper.ExternalDataInfo(tensor), tensor, files, name)
                value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
                if tensor.name in tensors and not torch.equal(tensors[tensor.name], value):
                    raise UserError(
                        f"{path} holds another '{tensor.name}' than the other graphs: export the bundle again."
                    )
                tensors[tensor.name] = value
        except UserError:
            raise
        except Exception as error:  # protobuf, onnx and the file system each have their own kinds
            raise UserError(f"{path} cannot be read ({error}): copy or export the bundle again.") from None
    return tensors
