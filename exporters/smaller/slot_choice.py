"""Which part of a memory's key space stays when it gets fewer slots, and what a memory recalls.

Keys are coordinates of latents in the space of M_ref (`memory_algebra`). The smaller space is the one that holds most
of the calibration keys' energy: their principal directions, about zero, because a key's length counts too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from microvlm.exporters.smaller.samples import Facts
from microvlm.memory.episodic import Entry, EpisodicMemory
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_runtime import TorchRuntime
from microvlm.state_choice import state_for


def principal_keys(model: MicroVLM, latents: np.ndarray, slots: int) -> Tensor:
    """Q [K, slots] with orthonormal columns: the directions of the keys of `latents` [N, C] with the most energy.

    Where fewer latents than `slots` are given, the rest are directions that no key has.
    """
    keys = keys_of(model, latents)
    energy = torch.from_numpy(keys.T @ keys).double()
    _, vectors = torch.linalg.eigh(energy)
    return vectors[:, -slots:].flip(1).float().contiguous()


@torch.no_grad()
def keys_of(model: MicroVLM, latents: np.ndarray) -> np.ndarray:
    """Keys [N, K] of latents [N, C]."""
    return model.memory_encoder.key(torch.from_numpy(latents)).numpy()


def recall(model: MicroVLM, facts: Facts) -> float:
    """Share of facts whose reading is nearest, of all facts, to their own latent, with all in the memory.

    As in use, a full state is followed by another, and a question reads the state that knows its key best.
    """
    runtime = TorchRuntime(model)
    memory = EpisodicMemory.empty(runtime)
    keys = keys_of(model, facts.cues)
    for number, (key, latent) in enumerate(zip(keys, facts.values, strict=True)):
        memory.write(runtime, Entry(str(number), key, latent, time=0.0))
    right = 0
    for number, (key, cue) in enumerate(zip(keys, facts.cues, strict=True)):
        state = state_for(key[None], memory.states)
        reading = runtime.memory_read(key[None], cue[None], state).latent[0]
        cosines = facts.values @ reading / np.linalg.norm(facts.values, axis=1)
        right += int(cosines.argmax() == number)
    return right / len(keys)
