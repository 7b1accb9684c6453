"""Recipes: everything that defines a training run, as frozen dataclasses read from JSON and checked when built."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from microvlm.errors import UserError
from microvlm.presets import preset_names

SCENE_KINDS = {"what": 0.4, "where": 0.36, "how many": 0.14, "which colour": 0.1}
"""Default shares of the scene questions: names and places take longer to learn than numbers and colours."""
PRECISIONS = ("no", "bf16")


def _check_precision(place: str, precision: str) -> None:
    if precision not in PRECISIONS:
        raise UserError(
            f"{place}: unknown mixed_precision '{precision}'; use one of {', '.join(PRECISIONS)}."
        )


@dataclass(frozen=True)
class StageConfig:
    """One stage: a task, its length and its optimiser."""

    name: str
    task: str
    """The task, a key of `trainer.TASKS`. `distill`: the vision encoder, on a convolutional teacher; `vlm`: the
    whole model, on captions and scenes; `recall`: the memory's encoder, readout and W_M alone, on facts and episodes
    over cached prefix embeddings; `scope`: the scope detector alone, on a bank of `batch_size` sets of facts."""
    steps: int
    batch_size: int
    learning_rate: float
    decoder_bits: float = 32
    """Bit width that the decoder and the memory encoder are trained for: 32, or 1.58 (then the embedding for 8)."""
    vision_learning_rate: float = 0.0
    """Learning rate of the vision encoder in a `vlm` stage; 0 freezes it."""
    muon_factor: float = 0.0
    """Muon's learning rate on the blocks' matrices, relative to their group's; 0 trains them with AdamW."""
    warmup_fraction: float = 0.05
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.1
    augment_strength: float = 1.0
    mixture: dict[str, float] = field(default_factory=dict)
    """Samples of each kind in a batch, as multiples of `batch_size`. `vlm`: caption, scene, episode, fact, and crowd
    (pictures of small emoji on a grid, for the vision encoder alone); `recall`: fact and episode."""

    scene_kinds: dict[str, float] = field(default_factory=lambda: dict(SCENE_KINDS))
    """Share of each kind of scene question; the shares sum to 1."""
    naming_weight: float = 0.0
    """Weight of `prefix_naming_loss`: the tied head names the object under a prefix embedding."""
    guidance_weight: float = 0.0
    """Weight of the attention losses that teach a question's word to find its object; see `attention_guidance`."""
    drawing_share: float = 0.0
    """Share of the pictured facts whose object is another drawing than an emoji (`microvlm-data drawings`). It does not
    apply to `recall` batches of objects that look alike, which choose among all drawings."""
    mixed_precision: str | None = None
    """Overrides the recipe's precision, for a stage that was trained on another kind of machine."""
    fresh: list[str] = field(default_factory=list)
    """Parts of the model (first words of parameter names) that this stage initialises anew."""

    def __post_init__(self) -> None:
        if self.mixed_precision is not None:
            _check_precision(f"stage '{self.name}'", self.mixed_precision)
        if min(self.steps, self.batch_size) < 1 or self.learning_rate <= 0:
            raise UserError(f"stage '{self.name}': steps, batch_size and learning_rate must be positive.")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on except the data folder."""

    name: str
    preset: str
    seed: int
    stages: tuple[StageConfig, ...]
    mixed_precision: str = "bf16"
    vendor_weights: dict[str, float] = field(default_factory=dict)
    """Relative frequency of each TRAIN vendor's drawings; 1 by default."""
    log_every: int = 20
    save_every: int = 250

    def __post_init__(self) -> None:
        if self.preset not in preset_names():
            raise UserError(f"recipe '{self.name}': unknown preset '{self.preset}'.")
        _check_precision(f"recipe '{self.name}'", self.mixed_precision)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(source: str) -> Recipe:
    """Load a packaged recipe by name, or a JSON file. Raises UserError."""
    packaged = resources.files("microvlm.training").joinpath("recipes", f"{source}.json")
    try:
        text = packaged.read_text() if packaged.is_file() else Path(source).read_text()
        raw = json.loads(text)
        stages = tuple(StageConfig(**stage) for stage in raw.pop("stages"))
        return Recipe(stages=stages, **raw)
    except OSError:
        raise UserError(f"no recipe '{source}': give a packaged name (nano) or a JSON file.") from None
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"recipe '{source}' cannot be used: {error}.") from None
