"""Opens a folder that `microvlm-data photo` has built: encoded pictures by split, and what they show."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.encoders.efficientnet_lite import HEAD_WIDTH
from microvlm.training.photo.data.builder import INDEX, PLAIN, Plan, chunk_paths
from microvlm.training.photo.data.class_names import class_names
from microvlm.training.photo.data.composer import Description
from microvlm.training.photo.data.encoder import ENCODER, fingerprint

REMEDY = "build the folder again with microvlm-data photo"


class _Index(Plan, frozen=True, kw_only=True):
    format: str
    encoder: str
    chunk: int


@dataclass
class PhotoData:
    """An opened folder."""

    folder: Path
    index: _Index
    _features: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)
    _descriptions: dict[str, list[Description]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> PhotoData:
        """Raises UserError for a folder that cannot be used."""
        path = folder / INDEX
        try:
            index = documents.parse(documents.read_file(path), _Index, path, REMEDY)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no {INDEX}: {REMEDY}.") from None
        if index.format != index.index_format:
            raise UserError(f"{path} is not in the format {index.index_format}: {REMEDY}.")
        if not (folder / ENCODER).is_file() or fingerprint(folder) != index.encoder:
            raise UserError(f"{folder} holds another encoder than its features are of: {REMEDY}.")
        return cls(folder, index)

    def descriptions(self, split: str) -> list[Description]:
        """What the pictures of a split show, in their order."""
        if split not in self._descriptions:
            found: list[Description] = []
            for number in range(self.index.chunks.get(split, 0)):
                path = chunk_paths(self.folder, split, number)[1]
                try:
                    lines = path.read_bytes().splitlines()
                    found += [msgspec.json.decode(line, type=Description) for line in lines]
                except (OSError, msgspec.DecodeError):
                    raise UserError(f"{path} cannot be read: {REMEDY}.") from None
            self._descriptions[split] = found
        return self._descriptions[split]

    def features(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Feature maps of these pictures, uint8 [n, 1280, 8, 8]; [n, 1283, 8, 8] in a folder with colours."""
        return np.stack([self._one(split, int(row)) for row in rows])

    @property
    def named_parts(self) -> list[str]:
        """The parts that classes are learnt from: training pictures, views of things, and things shown alone."""
        return [part for part in ("train", "views", PLAIN) if self.index.chunks.get(part, 0)]

    def photographs(self, split: str) -> np.ndarray:
        """The rows of a split that show one photograph, int64 [n]."""
        kinds = ("photo", "clutter")
        return np.array([row for row, d in enumerate(self.descriptions(split)) if d.kind in kinds], np.int64)

    def mean_features(self, split: str, rng: np.random.Generator, most: int) -> np.ndarray:
        """Mean features of random photographs of a split, in bytes, float32 [n <= most, 1280]."""
        rows = rng.permutation(self.photographs(split))[:most]
        parts = [rows[start : start + 64] for start in range(0, len(rows), 64)]
        return np.concatenate(
            [self.features(split, part)[:, :HEAD_WIDTH].astype(np.float32).mean((2, 3)) for part in parts]
        )

    @cached_property
    def names(self) -> list[str]:
        """Every name that the pictures of `named_parts` have, and those of the encoder's classes, each once, sorted."""
        pictures = [d for part in self.named_parts for d in self.descriptions(part)]
        shown = {thing.name for d in pictures for thing in d.things if thing.name is not None}
        return sorted(shown | set(class_names()))

    def _one(self, split: str, row: int) -> np.ndarray:
        number, place = divmod(row, self.index.chunk)
        if (split, number) not in self._features:
            path = chunk_paths(self.folder, split, number)[0]
            try:
                self._features[split, number] = np.load(path, mmap_mode="r")
            except (OSError, ValueError):
                raise UserError(f"{path} cannot be read: {REMEDY}.") from None
        places = self._features[split, number][place]
        side = int(len(places) ** 0.5)
        return np.ascontiguousarray(places.T).reshape(-1, side, side)
