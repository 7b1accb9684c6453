"""The weights that a stage stores for the next one and for the checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from microvlm.atomic import new_file
from microvlm.config import MicroVLMConfig
from microvlm.model.checkpoint import HEADS, read_tensors, resolve_checkpoint, write_tensors
from microvlm.model.checkpoint import WEIGHTS as WEIGHTS_FILE
from microvlm.model.microvlm import MicroVLM
from microvlm.training.loop.processes import Processes
from microvlm.training.loop.run_files import DONE, WEIGHTS
from microvlm.training.loop.run_state import changing_tensors
from microvlm.training.loop.sharding import whole_tensors
from microvlm.training.stages.task import Task


def save_weights(task: Task, folder: Path, processes: Processes) -> None:
    """Write what the stage has trained, or all of a model that was trained from its beginning.

    Every process must call this; all return when the main one has written.
    """
    result = task.result()
    tensors = changing_tensors(result)
    frozen = len(tensors) < len(result.state_dict())
    if not (frozen and task.keeps_frozen_parts_out):
        tensors = result.state_dict()
    tensors = whole_tensors(tensors, processes)
    heads = task.heads()
    head_tensors = None if heads is None else whole_tensors(heads.state_dict(), processes)
    if processes.is_main:
        with new_file(folder / WEIGHTS) as temporary:
            write_tensors(tensors, temporary)
        if head_tensors is not None:
            with new_file(folder / HEADS) as temporary:
                write_tensors(head_tensors, temporary)
        (folder / DONE).touch()
    processes.wait()


def load_heads(task: Task, path: Path) -> None:
    """Go on with the heads of an earlier stage or run, where there are any of the same shapes."""
    heads = task.heads()
    if heads is None or not path.is_file():
        return
    stored, _ = read_tensors(path)
    own = heads.state_dict()
    # Older versions store the scale as a scalar.
    stored = {n: t.reshape(own[n].shape) if n in own and t.dim() == 0 else t for n, t in stored.items()}
    if {name: t.shape for name, t in stored.items()} == {name: t.shape for name, t in own.items()}:
        heads.load_state_dict(stored)


def restore_dtypes(model: MicroVLM, dtypes: dict[str, torch.dtype], trained: set[str]) -> None:
    """Give weights that nothing has trained the precision that the start stores them at."""
    for name, parameter in model.named_parameters():
        if name not in trained and name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])


def restore_packed(model: MicroVLM, start: str, trained: set[str], decoder: str | None = None) -> None:
    """Give packed layers that nothing has trained the bytes of the start, which another rounding may change.

    decoder : the checkpoint that the decoder came from in place of the start's.
    """
    stored, _ = read_tensors(resolve_checkpoint(start) / WEIGHTS_FILE)
    if decoder is not None:
        theirs, _ = read_tensors(resolve_checkpoint(decoder) / WEIGHTS_FILE)
        stored = {name: t for name, t in stored.items() if not name.startswith("decoder.")}
        stored |= {name: t for name, t in theirs.items() if name.startswith("decoder.")}
    rotation = MicroVLMConfig.load(resolve_checkpoint(decoder or start)).text.rotation
    is_rotated_alike = rotation == model.config.text.rotation
    for name, tensor in model.state_dict().items():
        if name.startswith("decoder.") and not is_rotated_alike:
            continue  # its norms have no gains any more, and its weights are others
        layer = "embedding" if name.startswith("embedding.") else name.rpartition(".")[0]
        untrained = f"{layer}.weight" not in trained and name not in trained
        if (
            untrained
            and name in stored
            and stored[name].shape == tensor.shape
            and stored[name].dtype == tensor.dtype
        ):
            tensor.copy_(stored[name])
