"""An emoji folder as captioned pictures: one data set among others. Draws a plain view of each emoji as a PNG.

Pictures are training vendors' drawings of seen emoji, on white. A twentieth of them, by hash, is the validation split;
the test split is the test vendor's drawings of the same emoji.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from microvlm.training.data.caption_data import SPLITS, CaptionData, CaptionSample, Turn
from microvlm.training.emoji.data.drawing_sources import TEST_VENDOR, TRAIN_VENDORS, DataError
from microvlm.training.emoji.data.emoji import load_emoji

_VALIDATION_PERCENT = 5


class EmojiCaptions(CaptionData):
    """The training vendors' drawings of the seen emoji, with their captions."""

    def __init__(self, folder: str | Path):
        """Open a folder that `microvlm-data emoji` built. Raises UserError as `load_emoji` does, and without drawings
        of a training vendor."""
        self.folder = Path(folder)
        self.name = Path(folder).resolve().name
        self._emoji = load_emoji(folder)
        vendors = [v for v in (*TRAIN_VENDORS, TEST_VENDOR) if v in self._emoji.vendors]
        if not set(vendors) & set(TRAIN_VENDORS):
            raise DataError(f"{folder} has no drawings of a training vendor: run microvlm-data emoji.")
        self._rows: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
        for vendor in vendors:
            for row in np.flatnonzero(self._emoji.is_seen & self._emoji.present(vendor)):
                self._rows[self._split(vendor, int(row))].append((vendor, int(row)))

    def _split(self, vendor: str, row: int) -> str:
        if vendor == TEST_VENDOR:
            return "test"
        digest = hashlib.sha256(f"{vendor}/{self._emoji.hexcodes[row]}".encode()).hexdigest()
        return "validation" if int(digest, 16) % 100 < _VALIDATION_PERCENT else "train"

    def shard_sizes(self, split: str) -> np.ndarray:
        return np.array([len(self._rows[split])], dtype=np.int64)

    def sample(self, split: str, index: int) -> CaptionSample:
        if not 0 <= index < len(self._rows[split]):
            raise IndexError(
                f"sample {index} of {len(self._rows[split])} in the split {split} of {self.folder}"
            )
        vendor, row = self._rows[split][index]
        key = f"{vendor}-{self._emoji.hexcodes[row].lower()}"
        return CaptionSample(key, (self._picture(vendor, row),), (Turn(self._emoji.captions[row]),))

    def turns(self, split: str) -> Iterator[tuple[Turn, ...]]:
        return ((Turn(text),) for text in self.texts(split))

    def texts(self, split: str) -> Iterator[str]:
        return (self._emoji.captions[row] for _, row in self._rows[split])

    def _picture(self, vendor: str, row: int) -> bytes:
        import torch
        from PIL import Image

        from microvlm.training.emoji.data.views import plain_emoji, to_uint8

        drawing = np.array(self._emoji.images(vendor)[row : row + 1])
        pixels = to_uint8(plain_emoji(torch.from_numpy(drawing)))[0]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()
