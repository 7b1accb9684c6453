"""Recipes: a training run as frozen dataclasses, read from JSON and checked when built."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from microvlm.errors import UserError
from microvlm.presets import preset_names

TASKS = ("distill", "vlm", "recall", "scope")
SCENE_KINDS = {"what": 0.4, "where": 0.36, "how many": 0.14, "which colour": 0.1}
"""Names and places take longer to learn than numbers and colours."""


PRECISIONS = ("no", "bf16")


def _check_precision(where: str, precision: str) -> None:
    if precision not in PRECISIONS:
        raise UserError(
            f"{where}: unknown mixed_precision '{precision}'; use one of {', '.join(PRECISIONS)}."
        )


@dataclass(frozen=True)
class StageConfig:
    """One stage: a task, its length and its optimiser."""

    name: str
    task: str
    """`distill`: the vision encoder from the convolutional teacher; `vlm`: the whole model on captions and scenes;
    `recall`: the memory's encoder, readout and W_M alone, on facts and episodes about pictures that are seen once;
    `scope`: the scope detector alone, on a bank of `batch_size` draws of facts."""
    steps: int
    batch_size: int
    learning_rate: float
    decoder_bits: float = 32
    """Width that a `vlm` stage trains the decoder and the memory encoder for: 32, or 1.58 (the embedding then at 8)."""
    vision_learning_rate: float = 0.0
    """Rate of the vision encoder in a `vlm` stage; 0 freezes it."""
    muon_factor: float = 0.0
    """Rate of Muon on the matrices of the blocks, relative to the group's rate; 0 trains them with AdamW."""
    warmup_fraction: float = 0.05
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.1
    augment_strength: float = 1.0
    mixture: dict[str, float] = field(default_factory=dict)
    """How many samples of each kind, as shares of `batch_size`: in a `vlm` batch caption, scene, episode, fact (see
    `remember`), and crowd (small emoji for the vision encoder alone, of use where it learns); in a `recall` batch fact
    and episode."""

    scene_kinds: dict[str, float] = field(default_factory=lambda: dict(SCENE_KINDS))
    """Share of each kind of scene question; they sum to 1."""
    naming_weight: float = 0.0
    """Weight of the loss that makes a prefix embedding over an object read as that object's name in the tied head."""
    guidance_weight: float = 0.0
    """Weight of the attention losses that teach a question's word to find its object; see `guidance`."""
    drawing_share: float = 0.0
    """Share of the objects of pictured facts that are no emoji but other drawings (`microvlm-data drawings`). Objects
    of a `recall` batch that look alike are drawn from all drawings as they are."""
    mixed_precision: str | None = None
    """In the place of the recipe's, where a stage was trained on another kind of machine."""
    fresh: list[str] = field(default_factory=list)
    """Parts of the model (the first words of parameter names) that begin anew in a `vlm` stage."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(
                f"stage '{self.name}': unknown task '{self.task}'; use one of {', '.join(TASKS)}."
            )
        if self.mixed_precision is not None:
            _check_precision(f"stage '{self.name}'", self.mixed_precision)
        if min(self.steps, self.batch_size) < 1 or self.learning_rate <= 0:
            raise UserError(f"stage '{self.name}': steps, batch_size and learning_rate must be positive.")


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on but the data folder."""

    name: str
    preset: str
    seed: int
    stages: tuple[StageConfig, ...]
    mixed_precision: str = "bf16"
    vendor_weights: dict[str, float] = field(default_factory=dict)
    """How often each TRAIN vendor is drawn, relative to 1."""
    log_every: int = 20
    save_every: int = 250

    def __post_init__(self) -> None:
        if self.preset not in preset_names():
            raise UserError(f"recipe '{self.name}': unknown preset '{self.preset}'.")
        _check_precision(f"recipe '{self.name}'", self.mixed_precision)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(source: str) -> Recipe:
    """A packaged recipe's name or a JSON file. Raises UserError."""
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
