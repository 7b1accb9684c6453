"""Writes the shards of one split and their indexes, so that writing can go on where it was cut off.

`save` ends the archive of the shard that is being filled: from then on every file is whole and on the disk, and what
`progress` says can be kept in a journal. The next sample takes the place of the archive's end, and a writer that starts
from a journal cuts off whatever was written after it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from microvlm.training.data.annotations import Annotations
from microvlm.training.data.caption_data import Turn
from microvlm.training.data.data_folder import PictureSpan, SampleLine, Shard

SHARD_SAMPLES = 1000
SHARD_BYTES = 256_000_000
INDEX_BYTES = 16_000_000
"""A shard is full when it has so many samples, or about so many bytes in itself or in its index."""
_HEADER, _RECORD = 512, 10_240
"""Bytes of a member's header, to which contents are padded, and of a record, to which an archive is."""


class StoredPicture(msgspec.Struct, frozen=True):
    """A picture as a shard holds it."""

    content: bytes
    extension: str
    """Of a file's name, without the dot: `jpg`."""
    sha256: str
    """Hash of the source's bytes."""


class SplitProgress(msgspec.Struct):
    """What a split's writer has finished: its shards, and where the last one's samples end."""

    shards: list[Shard] = []
    end: int = 0


class SplitWriter:
    """Writes samples of one split into shards of a folder."""

    def __init__(self, folder: Path, split: str, progress: SplitProgress | None = None):
        """Start a split, or go on after `progress`, which another writer's `save` returned."""
        self.folder, self.split = folder, split
        self._shards = list(progress.shards) if progress else []
        self._end = progress.end if progress else 0
        self._samples = self._index_bytes = 0
        self._tar: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self._writer: Any = None

    @property
    def samples(self) -> int:
        """Samples written so far."""
        return sum(shard.samples for shard in self._shards) + (self._samples if self._tar else 0)

    def write(
        self,
        key: str,
        pictures: Sequence[StoredPicture],
        turns: Sequence[Turn],
        annotations: Annotations | None = None,
    ) -> None:
        """Append a sample."""
        if self._tar is None:
            self._open()
        start = self._end + self._writer.tarstream.offset
        names = [f"{n}.{p.extension}" if len(pictures) > 1 else p.extension for n, p in enumerate(pictures)]
        members: dict[str, Any] = {n: p.content for n, p in zip(names, pictures, strict=True)}
        known = {} if annotations is None else msgspec.to_builtins(annotations)
        members["json"] = msgspec.json.encode(
            {"turns": turns, **known, "sha256": [p.sha256 for p in pictures]}
        )
        offsets = {}
        for name in sorted(members):  # the order in which the writer takes them
            offsets[name] = start + _HEADER
            start += _HEADER + -(-len(members[name]) // _HEADER) * _HEADER
        self._writer.write({"__key__": key, **members})
        spans = [
            PictureSpan(offsets[n], len(p.content), p.sha256) for n, p in zip(names, pictures, strict=True)
        ]
        line = SampleLine(key, tuple(spans), tuple(turns), annotations)
        assert self._index is not None
        self._index_bytes += self._index.write(msgspec.json.encode(line) + b"\n")
        self._samples += 1
        full = self._samples >= SHARD_SAMPLES or self._index_bytes >= INDEX_BYTES
        if full or self._end + self._writer.tarstream.offset >= SHARD_BYTES:
            self._close()
            self._end = self._samples = self._index_bytes = 0

    def save(self) -> SplitProgress:
        """End the archive, flush the files, and return what a later writer goes on from."""
        if self._tar is not None:
            self._close()
        return SplitProgress(list(self._shards), self._end)

    def _open(self) -> None:
        """Open the last shard if it has room (`_end` is not 0), else the next one, behind its last sample."""
        from webdataset import TarWriter

        number = len(self._shards)
        if self._end:
            last = self._shards.pop()
            number -= 1
            self._samples, self._index_bytes = last.samples, last.index_bytes
        name = f"{self.split}-{number:05d}"
        self._tar = _open_at(self.folder / f"{name}.tar", self._end)
        self._index = _open_at(self.folder / f"{name}.jsonl", self._index_bytes)
        # No time, user or group: the same sources make the same bytes.
        self._writer = TarWriter(self._tar, user="", group="", mtime=0, encoder=False, compress=False)

    def _close(self) -> None:
        assert self._tar is not None
        assert self._index is not None
        self._end += self._writer.tarstream.offset
        self._writer.close()
        # Of the same length whatever the writer's own start was: it pads what it wrote itself to whole records.
        self._tar.truncate(self._end)
        self._tar.truncate(-(-(self._end + 2 * _HEADER) // _RECORD) * _RECORD)
        self._tar.seek(0, os.SEEK_END)
        name = Path(self._tar.name).stem
        self._shards.append(Shard(name, self._samples, self._tar.tell(), self._index.tell()))
        for file in (self._tar, self._index):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._tar = self._index = self._writer = None


def _open_at(path: Path, end: int) -> BinaryIO:
    """Open a file for writing behind its first `end` bytes, and cut off the rest."""
    file = open(path, "r+b" if end else "wb")  # noqa: SIM115
    file.truncate(end)
    file.seek(end)
    return file
