"""MicroVLM in optimum's TasksManager: `import optimum.exporters.microvlm` registers it, and its configuration class.

TasksManager.get_exporter_config_constructor("microvlm", model_type="microvlm", task="image-text-to-text")
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedTextConfig

import microvlm.exporters.elsewhere.auto_classes  # noqa: F401  registers the model type with transformers
from microvlm.config import MicroVLMConfig
from microvlm.exporters.contract import GraphSpec, TensorSpec, graphs

TASKS = ("image-text-to-text", "image-to-text", "text-generation", "visual-question-answering")


def _axes(tensors: list[TensorSpec]) -> dict[str, dict[int, str]]:
    return {
        tensor.name: {axis: dim for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
        for tensor in tensors
    }


@TasksManager.create_register("microvlm")("microvlm", *TASKS)
class MicroVLMExporterConfig(ExporterConfig):
    """What is exported for a `microvlm` configuration of transformers: the graphs of `microvlm.exporters.contract`."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig

    @property
    def _graphs(self) -> tuple[GraphSpec, ...]:
        document = self._config.to_dict()
        known = {"model_type", "format", *(field.name for field in dataclasses.fields(MicroVLMConfig))}
        return graphs(MicroVLMConfig.from_dict({key: document[key] for key in known & document.keys()}))

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Every input of the bundle's graphs -> its free axes."""
        return _axes([tensor for graph in self._graphs for tensor in graph.inputs])

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Every output of the bundle's graphs -> its free axes."""
        return _axes([tensor for graph in self._graphs for tensor in graph.outputs])

    def export(self, checkpoint: str | Path, output: str | Path, **options: Any) -> Path:
        """`microvlm.export` with its options -> the path of the bundle. Raises microvlm.errors.UserError."""
        from microvlm import export

        return export(checkpoint, output, **options)
