"""Recipes: everything that defines a training run, as frozen records read from JSON and checked when built."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from microvlm.config import Rotation
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Share, quote
from microvlm.presets import preset_names
from microvlm.training.caption_options import CaptionOptions, TeacherOptions
from microvlm.training.emoji.data.drawing_sources import TRAIN_VENDORS

SCENE_KINDS = {"what": 0.4, "where": 0.36, "how many": 0.14, "which colour": 0.1}
"""Default shares of the scene questions: names and places take longer to learn than numbers and colours."""
PRECISIONS = ("no", "bf16")
RESERVED_NAMES = (
    "checkpoint",
    "best",
    "pictures",
    "samples",
    "trackers",
    "recipe.json",
    "run.json",
    "status.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "summary.json",
    "outcome.json",
    "curves.png",
)
"""What a run's folder holds beside its stages' folders."""
LARGEST_RECIPE = 1_000_000
"""Bytes of a file."""
REMEDY = "mend the recipe; docs/training.md says where an example is"

Steps = Annotated[int, Meta(ge=1, le=10_000_000)]
Rate = Annotated[float, Meta(ge=0, le=10)]
Weight = Annotated[float, Meta(ge=0, le=1000)]
FolderName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._ -]{0,62}[A-Za-z0-9_-])?\Z")]
"""A name that is one folder on every system, below the one that it is joined to."""


class BadRecipe(UserError, ValueError):
    """A value or a combination that a recipe refuses. `args[0]` says what is wrong, without a full stop.

    As a ValueError it becomes a sentence with the file's and the entry's name where a file is read.
    """

    def __str__(self) -> str:
        return f"{self.args[0]}."


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise BadRecipe(problem)


def _check_fields(record: msgspec.Struct, place: str) -> None:
    """Hold every field against its type and range: a program may build a record, which msgspec does not check."""
    for item in msgspec.structs.fields(record):
        documents.convert(getattr(record, item.name), item.type, f"{place}: {item.name}", "change it")


def _check_precision(place: str, precision: str) -> None:
    _require(
        precision in PRECISIONS,
        f"{place}: unknown mixed_precision {quote(precision)}; use one of {', '.join(PRECISIONS)}",
    )


class StageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage: a task, its length and its optimiser."""

    name: FolderName
    task: str
    """The task, a key of `stages.registry.TASKS`. `captions`: any parts of the model, on pictures with captions, with a
    teacher or without. The others train on emoji: `distill`: the vision encoder, on a convolutional teacher; `vlm`: the
    whole model, on captions and scenes; `recall`: the memory's encoder, readout and W_M alone, on facts and episodes
    over cached prefix embeddings; `scope`: the scope detector alone, on a bank of `batch_size` sets of facts."""
    steps: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    """Optimiser steps; 0 where `epochs` says how long the stage is."""
    batch_size: Annotated[int, Meta(ge=1, le=65_536)] = 32
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 1e-4
    epochs: Annotated[float, Meta(ge=0, le=10_000)] = 0.0
    """Passes over the data, in place of `steps`; a run converts them when it begins."""
    decoder_bits: int | float = 32
    """Bit width that the decoder and the memory encoder are trained for: 32, or 1.58 (then the embedding for 8)."""
    rotation: Rotation = 0
    """Width of the Hadamard matrices that rotate the residual stream of a decoder which becomes ternary
    (`TextConfig.rotation`). A decoder that has a rotation keeps it at 0 too."""
    vision_learning_rate: Rate = 0.0
    """Learning rate of the vision encoder in a `vlm` stage; 0 freezes it."""
    muon_factor: Weight = 0.0
    """Muon's learning rate on the blocks' matrices, relative to their group's; 0 trains them with AdamW."""
    warmup_fraction: Share = 0.05
    weight_decay: Rate = 0.05
    max_grad_norm: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    augment_strength: Rate = 1.0
    mixture: dict[str, Annotated[float, Meta(ge=0, le=100)]] = {}
    """Samples of each kind in a batch, as multiples of `batch_size`. `vlm`: caption, scene, episode, fact, and crowd
    (pictures of small emoji on a grid, for the vision encoder alone); `recall`: fact and episode."""

    scene_kinds: dict[str, Share] = msgspec.field(default_factory=lambda: dict(SCENE_KINDS))
    """Share of each kind of scene question; the shares sum to 1."""
    naming_weight: Weight = 0.0
    """Weight of `prefix_naming_loss`: the tied head names the object under a prefix embedding."""
    guidance_weight: Weight = 0.0
    """Weight of the attention losses that teach a question's word to find its object; see `attention_guidance`."""
    drawing_share: Share = 0.0
    """Share of the pictured facts whose object is another drawing than an emoji (`microvlm-data drawings`). It does not
    apply to `recall` batches of objects that look alike, which choose among all drawings."""
    mixed_precision: str | None = None
    """Overrides the recipe's precision, for a stage that was trained on another kind of machine."""
    fresh: list[str] = []
    """Parts of the model (first words of parameter names) that this stage initialises anew."""
    caption: CaptionOptions = CaptionOptions()
    """What only a `captions` stage has: trained parts, rates, episodes, weights of the losses, teacher."""

    def __post_init__(self) -> None:
        place = f"stage {quote(self.name)}"
        _check_fields(self, place)
        if self.mixed_precision is not None:
            _check_precision(place, self.mixed_precision)
        _require(
            (self.steps > 0) != (self.epochs > 0),
            f"{place}: give 'steps' or 'epochs', one of the two, above 0",
        )
        _require(self.decoder_bits in (32, 1.58), f"{place}: decoder_bits must be 32 or 1.58")
        _require(
            self.rotation == 0 or self.decoder_bits == 1.58,
            f"{place}: a rotation needs decoder_bits of 1.58 in every stage; make the float stages a recipe of their "
            "own, and give this one their checkpoint with --start",
        )
        _require(
            set(self.scene_kinds) == set(SCENE_KINDS),
            f"{place}: scene_kinds must have a share for each of {', '.join(SCENE_KINDS)}",
        )
        _require(
            abs(math.fsum(self.scene_kinds.values()) - 1) <= 1e-8,
            f"{place}: the shares of scene_kinds must sum to 1",
        )
        _require(
            self.name.casefold() not in RESERVED_NAMES,
            f"{place}: the run's folder holds something else of this name",
        )

    def count_of(self, kind: str) -> int:
        """Samples of a kind of `mixture` in a batch."""
        return round(self.batch_size * self.mixture.get(kind, 0))


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a run depends on except the data folder."""

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    preset: str | None
    """The preset of a model that is trained from its beginning; null for a model that `--start` gives."""
    seed: Annotated[int, Meta(ge=0, le=500_000_000)]
    """Times stages and steps it must fit into the 64 bits of a generator's seed."""
    stages: Annotated[tuple[StageConfig, ...], Meta(min_length=1, max_length=100)]
    mixed_precision: str = "bf16"
    vendor_weights: dict[str, Weight] = {}
    """Relative frequency of each TRAIN vendor's drawings; 1 by default."""
    log_every: Steps = 20
    save_every: Steps = 250
    """Steps between two states to resume from."""
    save_every_epochs: Annotated[float, Meta(ge=0, le=10_000)] = 0.0
    """Passes over the data between two states, in place of `save_every`; 0 to save by steps."""
    keep_states: Annotated[int, Meta(ge=1, le=1000)] = 2
    """Newest states of a stage that are kept."""
    evaluate_every: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    """Steps between two evaluations; 0 for five in a stage. A stage is also evaluated at its beginning and end."""
    picture_every: Annotated[int, Meta(ge=0, le=10_000_000)] = 0
    """Steps between two sets of heatmaps and curves; 0 for five in a stage."""
    start: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    """A checkpoint that the first stage takes all parts from but its `fresh` ones, unless `--start` gives another."""
    colours: bool = False
    """Whether a model whose encoder is convolutional gets the mean colours of places (`VisionConfig.colours`). One that
    is started and has none computes what it did, until it learns; one that has them keeps them at false too."""

    def __post_init__(self) -> None:
        _check_fields(self, f"recipe {quote(self.name)}")
        _require(self.name.isprintable(), "its name must be printable text")
        _require(
            self.preset is None or self.preset in preset_names(),
            f"unknown preset {quote(self.preset or '')}; use one of {', '.join(preset_names())}",
        )
        _check_precision("all stages", self.mixed_precision)
        names = [stage.name.casefold() for stage in self.stages]
        _require(len(set(names)) == len(names), "two stages have one name")
        _require(
            len({stage.rotation for stage in self.stages}) == 1,
            "give all stages the same 'rotation', or none; float stages are a recipe of their own",
        )
        unknown = [vendor for vendor in self.vendor_weights if vendor not in TRAIN_VENDORS]
        _require(
            not unknown,
            f"unknown vendor {quote(unknown[:1] and unknown[0])}; use {', '.join(TRAIN_VENDORS)}",
        )
        _require(
            any(self.vendor_weights.get(vendor, 1.0) > 0 for vendor in TRAIN_VENDORS),
            "no vendor has a weight above 0",
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON. What older runs do not record has no key where it has its default: they go on."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        defaults = msgspec.to_builtins(TeacherOptions())
        for stage in content["stages"]:
            if not stage["rotation"]:
                del stage["rotation"]
            teacher = stage["caption"]["teacher"] or {}
            for name in ("device", "kept_gb"):
                if name in teacher and teacher[name] == defaults[name]:
                    del teacher[name]
        if not self.colours:
            del content["colours"]
        return content


def packaged_recipes() -> list[str]:
    """Names of the recipes that the package holds."""
    folder = resources.files("microvlm.training").joinpath("recipes")
    files = [file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")]
    return sorted(name for name in files if not name.endswith("-metrics"))


def load_recipe(source: str) -> Recipe:
    """Load a packaged recipe by name, or a JSON file. Raises UserError."""
    origin = f"recipe {quote(source)}"
    if source in packaged_recipes():
        packaged = resources.files("microvlm.training").joinpath("recipes", f"{source}.json")
        return documents.parse(packaged.read_bytes(), Recipe, origin, REMEDY)
    try:
        return documents.parse(documents.read_file(Path(source), LARGEST_RECIPE), Recipe, origin, REMEDY)
    except FileNotFoundError:
        names = ", ".join(packaged_recipes())
        raise UserError(f"no {origin}: give a packaged name ({names}) or a JSON file.") from None
