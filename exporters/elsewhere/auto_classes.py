"""Registers bundles with transformers' AutoConfig and AutoImageProcessor: `import` this module, and no code of a bundle
need be trusted."""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor

from microvlm.exporters.elsewhere.transformers_microvlm import MicroVLMConfig, MicroVLMImageProcessor

AutoConfig.register("microvlm", MicroVLMConfig, exist_ok=True)
AutoImageProcessor.register(MicroVLMConfig, slow_image_processor_class=MicroVLMImageProcessor, exist_ok=True)
