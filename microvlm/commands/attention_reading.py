"""Reads the decoder's attention to a picture: for every word of an answer, and for every token of the text.

A word's map is the attention that the picture draws to a place beyond what a plain picture of its mean colour draws
there, averaged over heads and layers, at the positions that chose the word's tokens. The difference leaves out where
attention rests whatever is seen. The adapter's pooling weights distribute a prefix embedding over the patches that it
is made of; what it takes from tokens of the whole picture has no place, and is given as a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from microvlm.commands.heatmap import Table, WordMap, split_words
from microvlm.generation import Prompt, place_images, positions_of, read_slot
from microvlm.inputs.processor import Inputs, Processor
from microvlm.memory.conversation import with_answer
from microvlm.runtime import Memories

if TYPE_CHECKING:
    from microvlm.config import VisionConfig
    from microvlm.model.torch_runtime import TorchRuntime

LEGEND = (
    "Bright: attention to a place beyond what a plain picture draws there, on one scale for all words (and never "
    "brighter than it is: full is at least an even share of all attention). Here: that attention, summed. Whole: "
    "attention to what stands for the whole picture and has no place."
)


class AttentionReading(NamedTuple):
    """Attention to one picture."""

    maps: list[WordMap]
    """One per word of the answer; weights are shares of the word's attention, and sum to at most 1."""
    table: Table
    """Attention [T, k] of the text's T tokens after the picture to the k prefix embeddings."""


def read_attention(
    runtime: TorchRuntime,
    processor: Processor,
    inputs: Inputs,
    prompt: Prompt,
    tokens: list[int],
    memory: Memories | None = None,
) -> AttentionReading:
    """Read the attention of the answer `tokens` to `prompt`, for batch 1 with one image."""
    assert inputs.pixel_values is not None
    plain = np.broadcast_to(inputs.pixel_values.mean((2, 3), keepdims=True), inputs.pixel_values.shape)
    embeds = place_images(
        prompt.inputs_embeds, inputs.input_ids, processor.image_id, runtime.encode_image(plain.copy())
    )
    seen = _attention(runtime, prompt, tokens, memory, prompt)
    unseen = _attention(runtime, Prompt(embeds, prompt.attention_mask), tokens, memory, prompt)
    # Column 0 is the memory slot. The row before a token's own row chose it.
    columns = np.flatnonzero(inputs.input_ids[0] == processor.image_id) + 1
    last = inputs.input_ids.shape[1] - 1
    total = seen[last : last + len(tokens), columns]
    drawn = total - unseen[last : last + len(tokens), columns]
    pooling, leading = _pooling(runtime, inputs)
    side = runtime.config.vision.image_size // runtime.config.vision.patch_size
    maps = []
    for word, members in split_words(processor, tokens):
        weights = np.maximum(drawn[members].mean(0), 0) @ pooling
        whole = float(total[members].mean(0) @ leading)
        note = f": {weights.sum():.0%} here, {whole:.0%} whole"
        maps.append(WordMap(word, weights.reshape(side, side).astype(np.float32), note))
    rows = [*range(int(columns[-1]), last), *range(last, last + len(tokens))]
    ids = [*map(int, inputs.input_ids[0][columns[-1] : last]), *tokens]
    labels = [processor.decode([token]) or "·" for token in ids]
    table = Table(
        "Attention of the question's and the answer's tokens to the picture's embeddings",
        labels,
        seen[np.array(rows)][:, columns],
        f"{len(columns)} prefix embeddings, in order; {_order(runtime.config.vision)}",
    )
    return AttentionReading(maps, table)


def _order(vision: VisionConfig) -> str:
    """What the prefix embeddings stand for, in order."""
    if vision.is_convolutional:
        name = f", the last {vision.name_pieces} spell the name of its class" if vision.name_pieces else ""
        return f"the first describes the whole picture, the next regions in reading order{name}"
    return f"the first {vision.num_leading_tokens} begin at the class tokens, the next at regions in reading order"


def _attention(
    runtime: TorchRuntime, prompt: Prompt, tokens: list[int], memory: Memories | None, asked: Prompt
) -> np.ndarray:
    """Attention of all positions of prompt and answer, mean over layers and heads, float32 [S, 1 + S].

    The memory is read with the prompt `asked`.
    """
    import torch

    turn = with_answer(runtime, prompt, tokens[:-1])
    memory_slot = read_slot(runtime, asked, memory)
    mask = np.concatenate([memory_slot.slot_mask[:, None], turn.attention_mask], 1)
    with torch.inference_mode():
        device = runtime.model.memory_prior.device
        embeds, visible, positions = (
            torch.from_numpy(array).to(device)
            for array in (turn.inputs_embeds, mask, positions_of(turn.attention_mask))
        )
        layers = runtime.model.decoder.attention_maps(embeds, visible, positions, memory_slot.slot)
        means = [layer[0].float().mean(0) for layer in layers]
    weights: np.ndarray = torch.stack(means).mean(0).cpu().numpy()
    return weights


def _pooling(runtime: TorchRuntime, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the patches in each prefix embedding, float32 [k, patches], and of the leading tokens together [k]."""
    import torch

    model = runtime.model
    with torch.inference_mode():
        features = model.vision(torch.from_numpy(inputs.pixel_values).to(model.memory_prior.device))
        weights = model.adapter.pooling_weights(features)[0].float().cpu().numpy()
    count = runtime.config.vision.num_leading_tokens
    return weights[:, count:], weights[:, :count].sum(1)
