"""The model that a run trains: a preset with a tokenizer of its own, or a checkpoint with its sizes and tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microvlm.config import MicroVLMConfig
from microvlm.inputs.processor import Processor
from microvlm.inputs.processor_files import read_documents
from microvlm.inputs.tokenizer import load_tokenizer
from microvlm.model.checkpoint import PROCESSOR_FILES, resolve_checkpoint
from microvlm.presets import preset
from microvlm.training.recipe import Recipe
from microvlm.training.tokenizer_training import save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class ModelBase:
    """Sizes, tokenizer and processor files of the model that a run trains."""

    config: MicroVLMConfig
    tokenizer: Any
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    """The checkpoint whose sizes and tokenizer the run keeps; None for a preset."""

    @property
    def keeps_start(self) -> bool:
        return self.folder is not None

    @classmethod
    def of(
        cls, recipe: Recipe, start: str | None, start_stage: str | None, texts: Callable[[], Iterable[str]]
    ) -> ModelBase:
        """The base of a run. `texts`: what a preset's tokenizer is trained on.

        A start that replaces the first stages of a preset's recipe changes neither sizes nor tokenizer.
        """
        if start is not None and (start_stage is None or recipe.preset is None):
            folder = resolve_checkpoint(start)
            config = MicroVLMConfig.load(folder)
            return cls(config, load_tokenizer(folder), read_documents(folder), folder)
        assert recipe.preset is not None  # a recipe without one needs a start
        config = preset(recipe.preset)
        return cls(config, train_tokenizer(texts(), config.text.vocab_size))

    def save_processor(self, config: MicroVLMConfig, folder: Path) -> None:
        """Write the processor's files into a checkpoint's folder: copies of the start's, or new ones."""
        if self.folder is None:
            save_tokenizer(self.tokenizer, config, folder)
            return
        for name in PROCESSOR_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        Processor.from_pretrained(folder)
