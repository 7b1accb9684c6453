"""The share of a global batch that one process computes: its rows, its captions and its episodes.

The batch of a step is the same for any number of processes. Each draws all of its texts, and the pictures of its own
share alone. The mean over processes of every part of the loss is the part of the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from microvlm.training.batches.sample_texts import IGNORED

if TYPE_CHECKING:
    from microvlm.training.batches.caption_batches import CaptionBatch
    from microvlm.training.batches.conversation_rows import Rows


class BatchShare(NamedTuple):
    """What a process knows of the whole batch beside its own share."""

    processes: int
    rows: int
    row_tokens: int
    """Labelled tokens of all rows."""
    row_positions: int
    """Positions of all rows that are no padding."""
    seeing: int
    """Rows that see a memory."""
    episodes: int
    answer_tokens: int
    """Labelled tokens of all episodes' answers."""
    caption_owner: np.ndarray
    """int64 [C]: the process that has each caption of the batch."""
    has_row: np.ndarray
    """bool [C]: whether a row asks for the caption; these are aligned with their pictures."""

    def part(self, mean: Tensor, own: int, total: int) -> Tensor:
        """A mean over `own` of `total` parts, scaled so that the mean over processes is the mean over all parts."""
        if self.processes == 1:
            return mean
        if own == 0:
            # The mean of nothing: its gradient is none, and its value must not spoil the sum.
            mean = mean.nan_to_num()
        return mean * (own * self.processes / max(1, total))

    def caption_counts(self) -> list[int]:
        """Captions of each process."""
        return np.bincount(self.caption_owner, minlength=self.processes).tolist()

    def caption_places(self) -> np.ndarray:
        """int64 [C]: where each caption of the batch stands among the processes' captions one after another."""
        return np.argsort(np.argsort(self.caption_owner, kind="stable"), kind="stable")

    def aligned_counts(self) -> list[int]:
        """Captions of each process that a row asks for. One after another they are in the batch's order."""
        return np.bincount(self.caption_owner[self.has_row], minlength=self.processes).tolist()


def split(count: int, process: int, processes: int) -> np.ndarray:
    """int64: which of `count` things a process has; neighbours stay together."""
    return np.array_split(np.arange(count), processes)[process]


def take_share(
    batch: CaptionBatch, pictures_of_rows: np.ndarray, process: int, processes: int
) -> tuple[np.ndarray, CaptionBatch]:
    """(numbers of the pictures that a process draws, its share of a batch without pixels).

    pictures_of_rows : int64 [B], how many pictures each row shows. Texts and keys stay those of the whole batch, and so
    do the pictures that episodes write: they are numbers of captions of the whole batch.
    """
    count = len(batch.rows.ids)
    row_owner = np.repeat(np.arange(processes), [len(split(count, p, processes)) for p in range(processes)])
    has_row = batch.caption_row >= 0
    owner = np.where(has_row, row_owner[batch.caption_row], 0)
    others = np.flatnonzero(~has_row)
    for p in range(processes):
        owner[others[split(len(others), p, processes)]] = p
    own_rows, own_captions = split(count, process, processes), np.flatnonzero(owner == process)
    row_of_picture = np.repeat(np.arange(count), pictures_of_rows)
    pictures = np.union1d(
        np.flatnonzero(np.isin(row_of_picture, own_rows)), batch.captioned[own_captions]
    ).astype(np.int64)
    episodes = batch.episodes
    share = BatchShare(
        processes,
        count,
        _labelled(batch.rows),
        int(batch.rows.mask.sum()),
        int((batch.visible_memory >= -1).sum()),
        0 if episodes is None else len(episodes.written),
        0 if episodes is None else _labelled(episodes.answers),
        owner,
        has_row,
    )
    visible = batch.visible_memory[own_rows]
    if episodes is not None:
        own = split(share.episodes, process, processes)
        seen = np.setdiff1d(visible[visible >= 0], own)
        held = np.concatenate([own, seen])
        place = {int(episode): number for number, episode in enumerate(held)}
        visible = np.array([place.get(int(number), number) for number in visible], np.int64)
        chosen = torch.from_numpy(own)
        episodes = episodes._replace(
            written=episodes.written[held],
            questions=_take(episodes.questions, own),
            answers=_take(episodes.answers, own),
            noise=episodes.noise[chosen],
        )
    first = own_rows[0] if len(own_rows) else 0
    rows_of_captions = batch.caption_row[own_captions]
    return pictures, batch._replace(
        rows=_take(batch.rows, own_rows),
        captioned=np.searchsorted(pictures, batch.captioned[own_captions]),
        caption_row=np.where(rows_of_captions >= 0, rows_of_captions - first, -1),
        captions=_take(batch.captions, own_captions) if len(batch.captioned) else batch.captions,
        visible_memory=visible,
        episodes=episodes,
        share=share,
    )


def _labelled(rows: Rows) -> int:
    return int((rows.labels != IGNORED).sum())


def _take(rows: Rows, chosen: np.ndarray) -> Rows:
    return type(rows)(*(part[torch.from_numpy(chosen)] for part in rows))
