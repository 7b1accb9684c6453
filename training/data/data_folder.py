"""The folder that `microvlm-data images` writes: its records, and how a trainer reads it.

| file | content |
|---|---|
| `dataset.json` | the record `DataSet`: splits, shards, options, counts and hashes |
| `train-00000.tar`, ... | WebDataset shards: the pictures `KEY.0.jpg`, ... and `KEY.json` of each sample |
| `train-00000.jsonl`, ... | the shard's index: the record `SampleLine` of each sample, one a line |
| `skipped.jsonl`, `preview.jpg` | what was left out and why; some of the pictures with their captions |
| `names.json` | where `microvlm-data names` wrote it, the record `NamesDocument`: other names of classes, by wnid |

The index repeats the text of the shard, so that texts are read without pictures, and says where each picture's bytes
are, so that a sample is read without its neighbours. Its size and the shard's are in `dataset.json`: a shard that was
cut, or replaced by another, is refused before its bytes are taken for a picture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Count, Sha256, Size
from microvlm.training.data.annotations import (
    NAMES_FILE,
    NAMES_FORMAT,
    Annotations,
    ClassNames,
    NamesDocument,
    with_names,
)
from microvlm.training.data.caption_data import (
    MAX_PICTURES,
    MAX_TURNS,
    SPLITS,
    CaptionData,
    CaptionSample,
    Turn,
)

DATA_FILE = "dataset.json"
DATA_FORMAT = "microvlm-images-1"
MAX_PICTURE_BYTES = 32_000_000
"""Most bytes of one picture's file in a shard."""
_OPEN_INDEXES = 64
"""Indexes that one process keeps: two groups of `Mixture`'s. About 300 KB each."""

ShardName = Annotated[str, Meta(pattern=r"^(train|validation|test)-[0-9]{5,7}\Z")]
Key = Annotated[str, Meta(pattern=r"^[0-9a-z_-]{1,64}\Z")]
Word = Annotated[str, Meta(max_length=300)]


class PictureSpan(msgspec.Struct, frozen=True):
    """Where a picture's bytes are in its shard, and the hash of the source's bytes, by which the split was chosen."""

    offset: Count
    bytes: Annotated[int, Meta(ge=1, le=MAX_PICTURE_BYTES)]
    sha256: Sha256


class SampleLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a shard's index."""

    key: Key
    images: Annotated[tuple[PictureSpan, ...], Meta(min_length=1, max_length=MAX_PICTURES)]
    turns: Annotated[tuple[Turn, ...], Meta(min_length=1, max_length=MAX_TURNS)]
    annotations: Annotations | None = None

    def __post_init__(self) -> None:
        if any(number >= len(self.images) for turn in self.turns for number in turn.images):
            raise ValueError(f"a turn names a picture that the sample's {len(self.images)} do not include")


class Shard(msgspec.Struct, frozen=True):
    """One shard, in the order of the samples."""

    name: ShardName
    samples: Size
    bytes: Size
    index_bytes: Annotated[int, Meta(ge=1, le=documents.MAX_DOCUMENT_BYTES)]


class DataSet(msgspec.Struct, frozen=True):
    """The content of `dataset.json`."""

    format: str
    shards: dict[str, list[Shard]]
    options: dict[Word, bool | int | float | str | None] = {}
    sources: list[dict[Word, int | str]] = []
    """What the samples were read from: kind, name without its folder, and the hash of what identifies it."""
    read: Count = 0
    skipped: dict[Word, Count] = {}
    repeated_pictures: Count = 0
    texts: dict[Word, float | int] = {}


class ShardedData(CaptionData):
    """A folder that `microvlm-data images` wrote.

    Reading needs about 20 MB beside one sample: the list of shards (100 bytes each; 12,000 for 12 million samples)
    and the indexes of the last `_OPEN_INDEXES` shards.
    """

    def __init__(self, folder: str | Path):
        """Read the folder's `dataset.json`. Raises UserError for a damaged one and one of another version."""
        path = Path(folder) / DATA_FILE
        try:
            content = documents.read_file(path)
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no {DATA_FILE}; run microvlm-data images SOURCE -o DIR and give DIR."
            ) from None
        if documents.parse(content, _Head, path, self._remedy).format != DATA_FORMAT:
            raise UserError(f"{path} is not in the format {DATA_FORMAT}: {self._remedy}.")
        self._describe(Path(folder), documents.parse(content, DataSet, path, self._remedy))

    @classmethod
    def of_shards(cls, folder: Path, shards: dict[str, list[Shard]]) -> ShardedData:
        """The shards of a folder that is not finished."""
        data = cls.__new__(cls)
        data._describe(folder, DataSet(DATA_FORMAT, shards))
        return data

    def _describe(self, folder: Path, description: DataSet) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.description = description
        self._starts = {split: _starts(self.shards(split)) for split in SPLITS}
        self._indexes: OrderedDict[str, list[bytes]] = OrderedDict()
        self._class_names: dict[str, ClassNames] | None = None

    @property
    def _remedy(self) -> str:
        return "delete the folder and build it again with microvlm-data images"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict()}

    def shards(self, split: str) -> list[Shard]:
        """The shards of a split. Raises ValueError for a name that is no split."""
        if split not in SPLITS:
            raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {split!r}")
        return self.description.shards.get(split, [])

    def shard_sizes(self, split: str) -> np.ndarray:
        self.shards(split)
        return np.diff(self._starts[split])

    def sample(self, split: str, index: int) -> CaptionSample:
        shards, starts = self.shards(split), self._starts[split]
        if not 0 <= index < starts[-1]:
            raise IndexError(f"sample {index} of {starts[-1]} in the split {split} of {self.folder}")
        number = int(np.searchsorted(starts, index, side="right")) - 1
        shard = shards[number]
        line = self._parse(shard, self._lines(shard)[index - int(starts[number])])
        annotations = with_names(line.annotations or Annotations(), self.class_names)
        return CaptionSample(line.key, self._pictures(shard, line), line.turns, annotations)

    @property
    def class_names(self) -> dict[str, ClassNames]:
        """What `microvlm-data names` wrote, by wnid; read once. Raises UserError for a damaged file."""
        if self._class_names is None:
            path, remedy = self.folder / NAMES_FILE, "write it again with microvlm-data names"
            self._class_names = {}
            if path.exists():
                document = documents.load(path, NamesDocument, remedy)
                if document.format != NAMES_FORMAT:
                    raise UserError(f"{path} is not in the format {NAMES_FORMAT}: {remedy}.")
                self._class_names = document.classes
        return self._class_names

    def lines(self, split: str, longer: bool = False) -> Iterator[SampleLine]:
        """The index of a split: every sample's key, turns and hashes, in order.

        `longer`: an index may have more bytes than is said, which are not read; a killed writer leaves such ones.
        """
        for shard in self.shards(split):
            for line in self._read_index(shard, longer):
                yield self._parse(shard, line)

    def turns(self, split: str) -> Iterator[tuple[Turn, ...]]:
        for line in self.lines(split):
            yield line.turns

    def texts(self, split: str) -> Iterator[str]:
        for turns in self.turns(split):
            for turn in turns:
                if turn.question is not None:
                    yield turn.question
                yield turn.answer

    def _lines(self, shard: Shard) -> list[bytes]:
        """The lines of a shard's index, from the ones that are kept."""
        lines = self._indexes.get(shard.name)
        if lines is None:
            lines = self._indexes[shard.name] = self._read_index(shard)
            if len(self._indexes) > _OPEN_INDEXES:
                self._indexes.popitem(last=False)
        else:
            self._indexes.move_to_end(shard.name)
        return lines

    def _read_index(self, shard: Shard, longer: bool = False) -> list[bytes]:
        path = self.folder / f"{shard.name}.jsonl"
        try:
            with documents.open_regular(path) as file:
                content = file.read(shard.index_bytes)
                rest = b"" if longer else file.read(1)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {self._remedy}.") from None
        lines = content.split(b"\n")[:-1]
        if rest or len(content) != shard.index_bytes or len(lines) != shard.samples:
            raise UserError(f"{path} is not the index that {DATA_FILE} describes: {self._remedy}.")
        return lines

    def _parse(self, shard: Shard, line: bytes) -> SampleLine:
        return documents.parse(line, SampleLine, self.folder / f"{shard.name}.jsonl", self._remedy)

    def _pictures(self, shard: Shard, line: SampleLine) -> tuple[bytes, ...]:
        """Read a sample's pictures. The shard is opened each time: an open file is not shared with forked processes."""
        path = self.folder / f"{shard.name}.tar"
        try:
            with documents.open_regular(path) as file:
                size = file.seek(0, 2)
                pictures = []
                for span in line.images:
                    file.seek(span.offset)
                    pictures.append(file.read(span.bytes))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {self._remedy}.") from None
        if size != shard.bytes or any(len(p) != s.bytes for p, s in zip(pictures, line.images, strict=True)):
            raise UserError(f"{path} is not the shard that {DATA_FILE} describes: {self._remedy}.")
        return tuple(pictures)


class _Head(msgspec.Struct, frozen=True):
    format: str = ""


def _starts(shards: list[Shard]) -> np.ndarray:
    """int64 [S + 1]: the number of each shard's first sample, and of all samples."""
    return np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64)
