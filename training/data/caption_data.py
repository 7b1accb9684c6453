"""Captioned pictures as a trainer reads them: samples of pictures and turns, by split and number.

`open_data` opens what `microvlm-data images` wrote, and an emoji folder. Decodes no picture and imports no torch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from microvlm.errors import UserError
from microvlm.training.data.annotations import Annotations

SPLITS = ("train", "validation", "test")
MAX_TEXT = 4000
"""Most characters of one question or answer."""
MAX_PICTURES = 64
"""Most pictures of one sample."""
MAX_TURNS = 256
"""Most turns of one sample."""

Declines = Annotated[str, Meta(pattern=r"^[0-9a-z][0-9a-z _-]{0,39}\Z")]
"""A kind of thing that is to be declined: noise, textures, clutter, absent, ..."""
TurnText = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
PictureNumber = Annotated[int, Meta(ge=0, lt=MAX_PICTURES)]


class Turn(msgspec.Struct, frozen=True):
    """One answer about pictures of its sample, and what it answers."""

    answer: TurnText
    question: TurnText | None = None
    """None: the answer is a caption, asked for with the model's own caption prompt."""
    images: Annotated[tuple[PictureNumber, ...], Meta(max_length=MAX_PICTURES)] = (0,)
    """Which of the sample's pictures are shown with it, from 0; none: only the memory can answer."""
    declines: Declines | msgspec.UnsetType = msgspec.UNSET
    """Set where the right answer is to decline: the kind of what cannot be answered; `answer` declines in words."""


class CaptionSample(NamedTuple):
    """Pictures and what is said about them, in the order in which they are shown and said."""

    key: str
    """Names the sample in messages; unique within its data folder."""
    images: tuple[bytes, ...]
    """Picture files: their bytes, for `microvlm.inputs.images.load_square`."""
    turns: tuple[Turn, ...]
    annotations: Annotations = Annotations()
    """What the picture is known to show."""


class CaptionData(ABC):
    """An opened data folder. Can be pickled, and used by processes that forked from the one that opened it."""

    folder: Path
    name: str

    @abstractmethod
    def shard_sizes(self, split: str) -> np.ndarray:
        """int64 [S]: samples of each shard, in the order of the samples' numbers. Neighbours on the disk share one."""

    @abstractmethod
    def sample(self, split: str, index: int) -> CaptionSample:
        """Read sample `index` of a split. Raises IndexError, and UserError for a damaged folder."""

    @abstractmethod
    def texts(self, split: str) -> Iterator[str]:
        """All questions and answers of a split, in the order of its samples. Reads no picture."""

    def turns(self, split: str) -> Iterator[tuple[Turn, ...]]:
        """Each sample's turns, in the order of the samples. Reads pictures only where a folder cannot do without."""
        for index in range(self.count(split)):
            yield self.sample(split, index).turns

    def count(self, split: str) -> int:
        """Samples of a split: `train`, `validation` or `test`."""
        return int(self.shard_sizes(split).sum())


def fingerprint(data: CaptionData) -> str:
    """sha256 of the file that describes a data folder; empty for data of another kind."""
    for name in ("dataset.json", "emoji.json"):
        path = data.folder / name
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return ""


def open_data(folder: str | Path) -> CaptionData:
    """Open a data folder: one of `microvlm-data images`, or of `microvlm-data emoji`.

    Raises UserError, one sentence that names the step which makes a folder readable.
    """
    from microvlm.temporary_folder import recover
    from microvlm.training.data.data_folder import DATA_FILE, ShardedData

    folder = Path(folder)
    recover(folder)
    if (folder / DATA_FILE).exists():
        return ShardedData(folder)
    if (folder / "emoji.json").exists():
        from microvlm.training.emoji.data.emoji_captions import EmojiCaptions

        return EmojiCaptions(folder)
    if folder.with_name(folder.name + ".partial").is_dir():
        raise UserError(
            f"{folder} is not finished: run the same microvlm-data images ... -o {folder} again, which goes on."
        )
    if not folder.exists():
        raise UserError(f"{folder} does not exist; make it with microvlm-data images SOURCE -o {folder}.")
    if (folder / "data" / DATA_FILE).exists():
        raise UserError(f"{folder} holds its data in a folder below it: give {folder / 'data'}.")
    raise UserError(
        f"{folder} holds no {DATA_FILE}, so it is no data folder; make one of your pictures with "
        f"microvlm-data images {folder} -o DIR, and give DIR."
    )
