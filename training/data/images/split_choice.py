"""Chooses the split of each sample by the hash of its pictures, and knows which pictures were there before.

A picture's split depends on its bytes and the shares alone: it stays where it is when a set grows, and no picture is in
two splits. Pictures that differ in one byte are different pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from microvlm.training.data.caption_data import SPLITS, Turn
from microvlm.training.data.images.source_record import DUPLICATE, TWO_SPLITS, BadRecord

_MERGE_AT = 65_536
SMALL_SET = 20
"""From so many samples on, a split with a share has at least one."""


class HashSet:
    """A set of 64-bit hashes, 8 bytes each: 100 MB for 12 million, two of which are equal at odds of 4 to a million."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __contains__(self, value: int) -> bool:
        if value in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(value)))
        return place < len(self._sorted) and int(self._sorted[place]) == value

    def add(self, value: int) -> None:
        self._recent.add(value)
        if len(self._recent) >= _MERGE_AT:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent = set()


class SplitChoice:
    """Gives each sample its split, in the order of the samples."""

    def __init__(self, validation: float, test: float):
        """`validation`, `test`: the shares of pictures, 0 to 1, whose sum is below 1."""
        self.validation, self.test = validation, test
        self.repeated_pictures = 0
        self._pictures, self._samples = HashSet(), HashSet()
        self._placed: dict[int, str] = {}
        """Pictures that are in another split than their own hash says."""

    def by_hash(self, sha256: str) -> str:
        """The split that a picture's hash says."""
        share = self._share(sha256)
        if share < self.test:
            return "test"
        return "validation" if share < self.test + self.validation else "train"

    def choose(self, hashes: Sequence[str], turns: Sequence[Turn]) -> str:
        """The split of a sample, which is entered. Raises BadRecord for one that is there already, and for one whose
        pictures are in two splits."""
        numbers = [int(sha256[:16], 16) for sha256 in hashes]
        sample = _sample_hash(hashes, turns)
        if sample in self._samples:
            raise BadRecord(DUPLICATE)
        known = {
            self._placed.get(number) or self.by_hash(sha256)
            for number, sha256 in zip(numbers, hashes, strict=True)
            if number in self._placed or number in self._pictures
        }
        if len(known) > 1:
            raise BadRecord(TWO_SPLITS)
        split = known.pop() if known else self.by_hash(hashes[0])
        self.enter(hashes, turns, split)
        return split

    def enter(self, hashes: Sequence[str], turns: Sequence[Turn], split: str) -> None:
        """Remember a sample that is in `split`."""
        self._samples.add(_sample_hash(hashes, turns))
        for sha256 in dict.fromkeys(hashes):
            number = int(sha256[:16], 16)
            if number in self._pictures:
                self.repeated_pictures += 1
            else:
                self._pictures.add(number)
            if self.by_hash(sha256) != split:
                self._placed[number] = split

    def fill_splits(self, first_samples: Sequence[Sequence[str]]) -> None:
        """Before anything is entered: see to it that the first samples, given by their pictures' hashes, reach every
        split that has a share. The training split comes first; the others need `SMALL_SET` samples.

        A split that gets none by its hashes gets the picture whose hash is nearest to it.
        """
        first = sorted({hashes[0] for hashes in first_samples}, key=self._share)
        alone = [sha256 for sha256 in first if self._is_alone(sha256, first_samples)]
        groups = {split: [s for s in first if self.by_hash(s) == split] for split in SPLITS}
        if first and not groups["train"]:
            self._placed[int(first[-1][:16], 16)] = "train"
            groups["train"] = [first[-1]]
        if len(first) < SMALL_SET:
            return
        candidates = [sha256 for sha256 in alone if self.by_hash(sha256) == "train"]
        for split, share in (("test", self.test), ("validation", self.validation)):
            if share and not groups[split] and len(candidates) > 1:
                self._placed[int(candidates.pop(0)[:16], 16)] = split

    def _is_alone(self, sha256: str, samples: Sequence[Sequence[str]]) -> bool:
        """Whether a picture is in no sample with others: moving it then moves nothing else."""
        return all(len(hashes) == 1 for hashes in samples if sha256 in hashes)

    @staticmethod
    def _share(sha256: str) -> float:
        return int(sha256[:16], 16) / 2**64


def _sample_hash(hashes: Sequence[str], turns: Sequence[Turn]) -> int:
    text = "\0".join([*hashes, *(f"{t.question}\1{t.answer}\1{t.images}" for t in turns)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
