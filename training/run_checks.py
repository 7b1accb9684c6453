"""What a run checks before it writes: stages that fit together, and a folder that is its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from microvlm.atomic import write_file
from microvlm.config import MicroVLMConfig, Rotation
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.inputs.tokenizer import load_tokenizer
from microvlm.model.checkpoint import resolve_checkpoint
from microvlm.temporary_folder import remove_leftovers
from microvlm.training.batches.token_rows import cut_alike
from microvlm.training.loop.run_files import CHECKPOINT, RECIPE, RUN
from microvlm.training.model_base import ModelBase
from microvlm.training.recipe import Recipe
from microvlm.training.stages.task import Task, WholeModelTask


def check_teachers(recipe: Recipe) -> None:
    """A teacher is the model that the run starts from: a stage after others that had none would have to be taught by a
    half-made run."""
    for before, stage in pairwise(recipe.stages):
        if stage.caption.teacher is not None and before.caption.teacher is None:
            raise UserError(
                f"stage '{stage.name}' has a teacher, which is the model that the run starts from: give the stages "
                "before it one too, or make it the first stage of a recipe of its own, and give --start the checkpoint "
                "of the run before."
            )


def decoder_rotation(decoder: str) -> Rotation:
    """The width of the rotation of a checkpoint's residual stream; 0 for none."""
    return MicroVLMConfig.load(resolve_checkpoint(decoder)).text.rotation


def check_rotation(base: ModelBase, first: MicroVLMConfig) -> None:
    """Raises UserError where the first stage, of configuration `first`, would rotate a ternary decoder."""
    stored = base.config
    if base.keeps_start and stored.quantization.is_ternary and stored.text.rotation != first.text.rotation:
        raise UserError(
            f"the start's decoder is ternary with a rotation of {stored.text.rotation}, which a stage with one of "
            f"{first.text.rotation} cannot change: give --start the float model that it was made from, or set the "
            f"`rotation` of the recipe's stages to {stored.text.rotation}."
        )


def check_decoder(
    decoder: str,
    start: str | None,
    base: ModelBase,
    configuration: Callable[[], MicroVLMConfig],
    fresh: Sequence[str],
) -> None:
    """Raises UserError for a decoder of another checkpoint that cannot take the place of the start's.

    configuration : the model's in the first stage, once the decoder is known to fit the start.
    """
    if start is None:
        raise UserError("--decoder-from takes the place of a start's decoder: give --start as well.")
    if "decoder" in fresh:
        raise UserError("--decoder-from and --fresh decoder exclude each other: leave one of them out.")
    if not base.keeps_start or base.config.quantization.is_ternary:
        raise UserError(
            f"--decoder-from {decoder} takes the place of a float decoder, and {start} has none: leave it out, or "
            "give --start the float model that the ternary one was made from."
        )
    folder = resolve_checkpoint(decoder)
    text = MicroVLMConfig.load(folder).text
    own = base.config.text
    alike = dataclasses.replace(text, sub_norm=own.sub_norm, rotation=own.rotation) == own
    if not alike or not cut_alike(load_tokenizer(folder), base.tokenizer):
        raise UserError(
            f"'{decoder}' is another model's checkpoint: its decoder or its tokens are not those of {start}."
        )
    first = configuration()
    if text.sub_norm != first.text.sub_norm:
        raise UserError(
            f"the decoder of {decoder} is {'ternary' if text.sub_norm else 'float'}, and that of the recipe's first "
            f"stage is not: set its `decoder_bits` to {1.58 if text.sub_norm else 32}."
        )
    if text.rotation != first.text.rotation:
        raise UserError(
            f"the decoder of {decoder} has a rotation of {text.rotation}, and that of the recipe's first stage one of "
            f"{first.text.rotation}: set the `rotation` of its stages to {text.rotation}."
        )


def stages_before(
    recipe: Recipe, classes: Sequence[type[Task]], start: str | None, start_stage: str | None
) -> int:
    """Number of stages that a start replaces. Raises UserError if the two options do not go together."""
    names = [stage.name for stage in recipe.stages]
    if start_stage is None and (start is None or recipe.preset is None or recipe.start is not None):
        if start is None and recipe.preset is None:
            raise UserError(
                f"recipe '{recipe.name}' trains a model that exists: give --start, a checkpoint that microvlm assemble "
                "or another run wrote."
            )
        return 0
    if start is None or start_stage is None:
        raise UserError(
            "--start and --start-stage go together: the checkpoint, and the first stage to run from it."
        )
    if start_stage not in names:
        raise UserError(
            f"recipe '{recipe.name}' has no stage '{start_stage}'; choose one of {', '.join(names)}."
        )
    index = names.index(start_stage)
    if not issubclass(classes[index], WholeModelTask):
        raise UserError(f"stage '{start_stage}' starts from nothing: choose a later --start-stage.")
    return index


def describe_difference(out: Path, recorded: dict[str, Any], asked: dict[str, Any]) -> str:
    """A sentence about a folder that holds another run: what differs, and what to do."""
    words = {"recipe": "recipe", "start": "start", "data": "data", "budget": "budget", "preset": "model"}
    differing = [words.get(key, key) for key in asked | recorded if asked.get(key) != recorded.get(key)]
    return (
        f"{out} holds another run ({out / RECIPE}), with another {' and '.join(differing)}: choose another --output "
        f"or delete it. To train a finished model further, start a new run with --start {out / CHECKPOINT}."
    )


def check_folder(out: Path, first_stage: str) -> None:
    """Raises UserError for a folder that holds something else than a run."""
    remove_leftovers(out)  # of a start that was killed before it had its recipe written
    ours = {RECIPE, RUN}  # of a run that took no step
    others = out.exists() and any(path.name not in ours for path in out.iterdir())
    if others and not (out / first_stage).exists():
        raise UserError(f"{out} exists and is not a training folder: choose another --output.")


def claim_folder(out: Path, first_stage: str, description: dict[str, Any]) -> None:
    """Write a run's description into its folder, or refuse a folder that belongs to something else."""
    check_folder(out, first_stage)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / RECIPE, json.dumps(description, indent=2) + "\n")


def read_description(out: Path) -> dict[str, Any] | None:
    path = out / RECIPE
    if not path.is_file():
        return None
    # Folders of older versions do not record their preset.
    return documents.load(path, dict[str, Any], f"delete {out}, or choose another --output")


def summarize_names(names: Sequence[str]) -> str:
    """Names of parameters, or of the parts that they belong to where there are many."""
    return ", ".join(names if len(names) <= 8 else dict.fromkeys(name.split(".")[0] for name in names))
