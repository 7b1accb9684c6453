"""States to resume a stage from: safetensors and JSON, one folder a state, each written whole or not at all.

A state holds what training changes: parameters that learn, buffers, optimisers, schedules, random generators and the
memory of the last batch. Frozen parameters come from where the stage starts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from microvlm.atomic_folder import new_folder
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count
from microvlm.model.checkpoint import read_tensors, write_tensors
from microvlm.training.loop.processes import Processes
from microvlm.training.loop.sharding import split_like, whole_tensors

STATES = "states"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
_MEMORY, _RANDOM = "memory.", "random."


class StateDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON part of a state."""

    format: Annotated[int, Meta(ge=1, le=FORMAT)]
    step: Count
    rates: list[list[Annotated[float, Meta(ge=0, le=1e4)]]]
    """Learning rates of each optimiser's groups for the next step."""
    best: dict[str, float] = {}
    """`loss` and `step` of the best evaluation so far."""


def changing_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that its training changes: parameters that learn, and all buffers."""
    learning = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return learning | {name: buffer for name, buffer in module.named_buffers() if name in module.state_dict()}


def state_folders(stage: Path) -> list[Path]:
    """The complete states of a stage, oldest first."""
    folder = stage / STATES
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdecimal() and (path / STATE).is_file())


def save_state(
    stage: Path,
    step: int,
    module: nn.Module,
    optimizers: Sequence[Any],
    memory: Sequence[Tensor],
    best: dict[str, float],
    keep: int,
    processes: Processes | None = None,
) -> None:
    """Write the state after `step` steps, then delete all but the newest `keep`. Raises UserError for a full disk.

    memory : M [n, K, C] and U [n, K, K] of the last batch's episodes, or nothing. processes : all of them must call
    this, because tensors may be split over them; the main one writes the state, which is that of one process.
    """
    processes = processes or Processes()
    tensors: dict[str, Tensor] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{parameter}.{name}": torch.as_tensor(v) for name, v in values.items()}
    tensors = whole_tensors(tensors, processes)
    weights = whole_tensors(changing_tensors(module), processes)
    if not processes.is_main:
        return
    tensors[f"{_RANDOM}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    tensors |= {f"{_MEMORY}{name}": part for name, part in zip(("mean", "covariance"), memory, strict=False)}
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    document = {"format": FORMAT, "step": step, "rates": rates, "best": best}
    target = stage / STATES / f"{step:08d}"
    with new_folder(target, lambda old: True) as folder:
        write_tensors(weights, folder / MODEL)
        write_tensors(tensors, folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps(document) + "\n")
    for old in state_folders(stage)[:-keep]:
        # The JSON file goes first: without it a folder is no state.
        (old / STATE).unlink()
        shutil.rmtree(old, ignore_errors=True)


def load_state(
    stage: Path, module: nn.Module, optimizers: Sequence[Any], schedulers: Sequence[Any]
) -> StateDocument | None:
    """Load a stage's newest state; None if it has none. Raises UserError for one that is damaged or does not fit."""
    folders = state_folders(stage)
    if not folders:
        return None
    folder = folders[-1]
    remedy = f"delete {folder} to go on from the state before it"
    document = documents.load(folder / STATE, StateDocument, remedy)
    own = changing_tensors(module)
    stored, _ = read_tensors(folder / MODEL)
    stored = _one_element_vectors(stored, own)
    if {name: value.shape for name, value in stored.items()} != {name: v.shape for name, v in own.items()}:
        raise UserError(f"{folder} is the state of another model: {remedy}.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(split_like(stored[name], value))
    tensors, _ = read_tensors(folder / OPTIMIZER)
    try:
        for index, (optimizer, rates) in enumerate(zip(optimizers, document.rates, strict=True)):
            optimizer.load_state_dict(_optimizer_state(index, optimizer, rates, tensors))
        for scheduler, rates in zip(schedulers, document.rates, strict=True):
            done = {"last_epoch": document.step, "_step_count": document.step + 1, "_last_lr": rates}
            scheduler.load_state_dict(scheduler.state_dict() | done)
        torch.set_rng_state(tensors[f"{_RANDOM}cpu"])
    except (ValueError, KeyError, IndexError, RuntimeError, TypeError):
        raise UserError(f"{folder} does not fit this stage's optimisers: {remedy}.") from None
    if torch.cuda.is_available() and f"{_RANDOM}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{_RANDOM}cuda"])
    return document


def _optimizer_state(
    index: int, optimizer: Any, rates: list[float], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The state of an optimiser as it loads it. Everything but rates and tensors is as the recipe builds it."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        number, _, rest = name.partition(".")
        if number == str(index):
            place, _, leaf = rest.partition(".")
            parameter = parameters[int(place)]
            if leaf != "step":
                tensor = split_like(_as_vector(tensor, parameter), parameter)
            state.setdefault(int(place), {})[leaf] = tensor
    groups = optimizer.state_dict()["param_groups"]
    return {
        "state": state,
        "param_groups": [group | {"lr": rate} for group, rate in zip(groups, rates, strict=True)],
    }


def _one_element_vectors(stored: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars of an older version as the vectors of one element that they are now."""
    return {name: _as_vector(t, own[name]) if name in own else t for name, t in stored.items()}


def _as_vector(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.dim() == 0 and like.shape == (1,) else tensor
