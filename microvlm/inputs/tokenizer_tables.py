"""Byte-level BPE over tables in a mapped file: the ids of the `tokenizers` library, with almost no memory.

The file is safetensors. `exporters/vocabulary/table_builder.py` writes it and checks it against the library.
V tokens, M merges, C runs of code points, T bytes of token text:

| tensor | |
|---|---|
| `merge_pairs` uint64 [M] | left id << 32 or right id, ascending |
| `merge_ranks`, `merge_results` uint32 [M] | the pair's rank (0 merges first) and the merged token's id |
| `byte_tokens` uint32 [256] | the token of every byte |
| `token_ends` uint32 [V + 1], `token_bytes` uint8 [T] | token i has the bytes from token_ends[i] to token_ends[i + 1] |
| `sorted_tokens` uint32 [V] | ids sorted by their bytes; only for tokenizers that look up whole words before merging |
| `class_starts` uint32 [C], `class_flags` uint8 [C] | class flags of runs of code points (`tokenizer_pieces`) |

Metadata `tokenizer` is JSON: `format`, `source_sha256` and `source_bytes` of the tokenizer.json it was built from,
`added_tokens` (id, content, special, normalized), `patterns`, `normalizer`.
"""

from __future__ import annotations

import json
import mmap
import re
from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any, Literal

import numpy as np

from microvlm.errors import UserError
from microvlm.inputs.tokenizer_pieces import PieceSplitter

TOKENIZER = "tokenizer.json"
TABLES = "tokenizer_tables.safetensors"
TABLES_FORMAT = 1
_CASTS: dict[str, Literal["Q", "I", "B"]] = {"U64": "Q", "U32": "I", "U8": "B"}


class TableTokenizer:
    """A `TextTokenizer` over mapped tables. Build it with `open`."""

    description = "mapped tables"

    def __init__(self, path: Path, arrays: dict[str, memoryview], facts: dict[str, Any]):
        """`arrays` are the tensors and `facts` the metadata that the module's docstring lists."""
        self._path = path
        self.identity: str = facts["source_sha256"]
        self.source_bytes: int = facts["source_bytes"]
        self._pairs = arrays["merge_pairs"]
        self._ranks, self._results = arrays["merge_ranks"], arrays["merge_results"]
        self._byte_tokens = arrays["byte_tokens"].tolist()
        self._ends, self._bytes = arrays["token_ends"], arrays["token_bytes"]
        self._sorted = arrays.get("sorted_tokens")
        self.vocab_size = len(self._ends) - 1
        added = facts["added_tokens"]
        self.added_tokens: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._special = frozenset(token["id"] for token in added if token["special"])
        self._raw_added = _alternation(t["content"] for t in added if not t["normalized"])
        self._normalised_added = _alternation(t["content"] for t in added if t["normalized"])
        starts, flags = (np.asarray(arrays[name]) for name in ("class_starts", "class_flags"))
        self._splitter = PieceSplitter(starts, flags, facts["patterns"], facts["normalizer"])

    @classmethod
    def open(cls, path: Path) -> TableTokenizer:
        """Map the tables of a file. Raises UserError for a damaged file or a newer format."""
        try:
            arrays, metadata = _map_safetensors(path)
            facts = json.loads(metadata["tokenizer"])
            if facts["format"] > TABLES_FORMAT:
                raise UserError(f"{path} was written by a newer microvlm; upgrade the package.")
            tables = cls(path, arrays, facts)
            sizes = {len(tables._pairs), len(tables._ranks), len(tables._results)}
            if len(sizes) != 1 or len(tables._byte_tokens) != 256 or tables._ends[-1] != len(tables._bytes):
                raise ValueError("lengths do not agree")
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, re.error):
            raise UserError(f"{path} is damaged: copy or export the bundle again.") from None
        return tables

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for is_added, part in _split(self._raw_added, text):
            if is_added:
                ids.append(self.added_tokens[part])
                continue
            for is_late, words in _split(self._normalised_added, self._splitter.normalise(part)):
                if is_late:
                    ids.append(self.added_tokens[words])
                    continue
                for piece in self._splitter.split(words):
                    ids += self._piece_ids(piece.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        ordinary_ids = (
            number for number in ids if 0 <= number < self.vocab_size and number not in self._special
        )
        return b"".join(self._token(number) for number in ordinary_ids).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        return self.added_tokens.get(token)

    def save(self, directory: Path) -> None:
        for name in (TOKENIZER, TABLES):
            (directory / name).write_bytes((self._path.parent / name).read_bytes())

    def _token(self, number: int) -> bytes:
        return bytes(self._bytes[self._ends[number] : self._ends[number + 1]])

    def _piece_ids(self, piece: bytes) -> list[int]:
        if self._sorted is not None:
            place = bisect_left(self._sorted, piece, key=self._token)
            if place < len(self._sorted) and self._token(self._sorted[place]) == piece:
                return [self._sorted[place]]
        return self._merge([self._byte_tokens[byte] for byte in piece])

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge byte tokens: always the pair of lowest rank, the leftmost of equals, until no pair has a merge.

        A priority queue avoids a search through the whole piece per merge: a piece may be a page without a space.
        """
        count = len(ids)
        following, previous = list(range(1, count + 1)), list(range(-1, count))
        queue: list[tuple[int, int, int, int, int]] = []
        for left in range(count - 1):
            queue += self._candidate(left, ids[left], ids[left + 1])
        heapify(queue)
        while queue:
            _, left, merged, first, second = heappop(queue)
            right = following[left]
            if ids[left] != first or right == count or ids[right] != second:
                continue  # an earlier merge has consumed one of the two
            ids[left], ids[right] = merged, -1
            following[left] = after = following[right]
            previous[after] = left
            if after < count:
                for candidate in self._candidate(left, merged, ids[after]):
                    heappush(queue, candidate)
            before = previous[left]
            if before >= 0:
                for candidate in self._candidate(before, ids[before], merged):
                    heappush(queue, candidate)
        return [number for number in ids if number >= 0]

    def _candidate(self, left: int, first: int, second: int) -> list[tuple[int, int, int, int, int]]:
        """The queue entry of two neighbours, as a list; empty if they have no merge."""
        pair = first << 32 | second
        place = bisect_left(self._pairs, pair)
        if place == len(self._pairs) or self._pairs[place] != pair:
            return []
        return [(self._ranks[place], left, self._results[place], first, second)]


def _alternation(contents: Any) -> re.Pattern[str] | None:
    """A pattern that matches any of the texts, the longest first like the library; None without texts."""
    ordered = sorted(contents, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _split(pattern: re.Pattern[str] | None, text: str) -> list[tuple[bool, str]]:
    """Split `text` by a pattern -> (whether the part matched, part), in order."""
    parts = [text] if pattern is None else pattern.split(text)
    return [(index % 2 == 1, part) for index, part in enumerate(parts) if part]


def _map_safetensors(path: Path) -> tuple[dict[str, memoryview], dict[str, str]]:
    """Map a safetensors file -> (views of its tensors, metadata). Raises ValueError and others when damaged."""
    with path.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(bytes(whole[8:start]))
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if not 0 <= first <= last <= len(whole) - start:
            raise ValueError(name)
        arrays[name] = whole[start + first : start + last].cast(_CASTS[entry["dtype"]])
    return arrays, metadata
