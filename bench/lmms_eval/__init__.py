"""MicroVLM in lmms-eval: `lmms_eval --model microvlm --model_args pretrained=BUNDLE`, found by an entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval asks the entry points of the group `lmms_eval.models` for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("microvlm", simple_class_path="microvlm.bench.lmms_eval.model.MicroVLMModel")
