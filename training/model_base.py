"""The model that a run trains: a preset with a tokenizer of its own, or a checkpoint with its sizes and tokenizer."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
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
    adds_colours: bool = False
    """Whether the model has colours because the recipe says so; the checkpoint then lacks what reads them."""

    @property
    def keeps_start(self) -> bool:
        return self.folder is not None

    @classmethod
    def of(
        cls, recipe: Recipe, start: str | None, start_stage: str | None, texts: Callable[[], Iterable[str]]
    ) -> ModelBase:
        """The base of a run. `texts`: what a preset's tokenizer is trained on.

        A start that replaces the first stages of a preset's recipe changes neither sizes nor tokenizer.
        Raises UserError for colours of a model that cannot have them.
        """
        if start is not None and (start_stage is None or recipe.preset is None):
            folder = resolve_checkpoint(start)
            stored = MicroVLMConfig.load(folder)
            config = _with_colours(stored, recipe)
            adds_colours = config != stored
            return cls(config, load_tokenizer(folder), read_documents(folder), folder, adds_colours)
        assert recipe.preset is not None  # a recipe without one needs a start
        config = _with_colours(preset(recipe.preset), recipe)
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


def _with_colours(config: MicroVLMConfig, recipe: Recipe) -> MicroVLMConfig:
    """The configuration with colours if the recipe says so."""
    if not recipe.colours:
        return config
    if not config.vision.is_convolutional:
        raise UserError(
            f"recipe {quote(recipe.name)} has 'colours', which {quote(config.name)} cannot have: they need a "
            "convolutional encoder, such as preset photo's."
        )
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, colours=True))
