"""Heatmaps and attention metrics of a `captions` stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microvlm.model.microvlm import MicroVLM, positions_of
from microvlm.training.batches.caption_batches import CaptionBatch
from microvlm.training.losses.memory_episodes import utilization
from microvlm.training.stages.caption_statistics import attention_metrics
from microvlm.training.watching import names
from microvlm.training.watching.plots import addressing_heatmap, attention_heatmap

if TYPE_CHECKING:
    from microvlm.training.stages.captions import CaptionTask

ROWS = 4
"""Rows of a training batch whose attention is measured."""


def draw_attention(
    task: CaptionTask, model: MicroVLM, batch: CaptionBatch, keys: Tensor | None, folder: Path, step: int
) -> tuple[dict[str, Path], dict[str, float]]:
    """Draw where the first row's tokens look in its picture, and which slots the memory's keys use.

    Returns pictures by name and the metrics of attention over a few rows.
    """
    weights, tokens = prefix_attention(task, model, batch)
    pictures: dict[str, Path] = {}
    values: dict[str, float] = {}
    if weights is not None:
        path = folder / f"attention-{step:08d}.png"
        attention_heatmap(weights[0].cpu().numpy(), tokens, path)
        pictures[names.ATTENTION_HEATMAP] = path
        values |= attention_metrics(torch.cat(weights))
    if keys is not None:
        path = folder / f"addressing-{step:08d}.png"
        addressing_heatmap(keys.float().cpu().numpy(), path)
        pictures[names.ADDRESSING_HEATMAP] = path
        values[names.MEMORY_UTILIZATION] = utilization(keys)
    return pictures, values


def prefix_attention(
    task: CaptionTask, model: MicroVLM, batch: CaptionBatch, most: int = ROWS
) -> tuple[list[Tensor] | None, list[str]]:
    """Attention of text tokens to the prefix embeddings, mean over the late layers and all heads.

    Returns a matrix [T, k] for each of the first `most` rows with pictures, and the first one's T tokens; None without
    rows.
    """
    processor = task.rows.processor
    rows = batch.rows.to(model.memory_prior.device)
    count = min(most, len(rows.ids))
    ids, mask = rows.ids[:count], rows.mask[:count]
    is_image = ids == processor.image_id
    images = int(is_image.sum()) // task.config.prefix_tokens
    if images == 0:
        return None, []
    prefixes = task.encode(model, batch.pixels[:images])
    embeds = model.place_images(ids, processor.image_id, prefixes)
    # Column 0 is the memory's slot, which is masked.
    visible = torch.cat([mask.new_zeros(count, 1), mask], 1)
    maps = model.decoder.attention_maps(embeds, visible, positions_of(mask), model.empty_slot(count))
    late = torch.stack(maps[len(maps) // 2 :]).mean((0, 2))[:, :, 1:]
    weights: list[Tensor] = []
    tokens: list[str] = []
    for row in range(count):
        # Of the last picture alone: rows with one picture and with several have the same width.
        columns = is_image[row].nonzero()[:, 0][-task.config.prefix_tokens :]
        if not len(columns):
            continue
        after = torch.arange(ids.shape[1], device=ids.device) > columns[-1]
        text = (after & mask[row].bool()).nonzero()[:, 0]
        weights.append(late[row][text][:, columns].float())
        if not tokens:
            tokens = [processor.decode([int(ids[row, at])]) or "·" for at in text]
    return (weights or None), tokens
