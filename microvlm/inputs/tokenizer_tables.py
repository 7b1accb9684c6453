"""Byte-level BPE over sorted tables: the ids of the `tokenizers` library, with little memory.

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

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from msgspec import Struct, field

from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.inputs.tokenizer_document import TokenId, TokenText
from microvlm.inputs.tokenizer_patterns import translated_patterns
from microvlm.inputs.tokenizer_pieces import CLASS_FLAGS, PieceSplitter

TOKENIZER = "tokenizer.json"
TABLES = "tokenizer_tables.safetensors"
TABLES_FORMAT = 1
_REMEDY = "copy or export the bundle again"
_CODE_POINTS = 0x110000


class _Format(Struct, frozen=True):
    format: documents.Count


class TableToken(Struct, frozen=True):
    """An added token: see `TableTokenizer.added_tokens`."""

    id: TokenId
    content: TokenText
    special: bool
    normalized: bool


class TableFacts(Struct, frozen=True):
    """The metadata of the tables."""

    source_sha256: documents.Sha256
    source_bytes: documents.Count
    added_tokens: tuple[TableToken, ...]
    patterns: tuple[str, ...]
    normalizer: Literal["NFC"] | None


class _Tensor(Struct, frozen=True):
    shape: tuple[documents.Count]
    data_offsets: tuple[documents.Count, documents.Count]


class _Bytes(_Tensor, frozen=True):
    dtype: Literal["U8"]


class _Words(_Tensor, frozen=True):
    dtype: Literal["U32"]


class _Pairs(_Tensor, frozen=True):
    dtype: Literal["U64"]


class _Metadata(Struct, frozen=True):
    tokenizer: str


class _Header(Struct, frozen=True):
    metadata: _Metadata = field(name="__metadata__")
    merge_pairs: _Pairs
    merge_ranks: _Words
    merge_results: _Words
    byte_tokens: _Words
    token_ends: _Words
    token_bytes: _Bytes
    class_starts: _Words
    class_flags: _Bytes
    sorted_tokens: _Words | None = None


class Tables(NamedTuple):
    """Views of the tensors that the module's docstring lists."""

    merge_pairs: memoryview
    merge_ranks: memoryview
    merge_results: memoryview
    byte_tokens: memoryview
    token_ends: memoryview
    token_bytes: memoryview
    class_starts: memoryview
    class_flags: memoryview
    sorted_tokens: memoryview | None


class TableTokenizer:
    """A `TextTokenizer` over tables. Build it with `open`."""

    description = "tables"

    def __init__(self, path: Path, tables: Tables, facts: TableFacts):
        """Raises ValueError for tables whose lengths, offsets or ids do not agree."""
        self._path = path
        self.identity: str = facts.source_sha256
        self.source_bytes: int = facts.source_bytes
        _check_tables(tables, facts)
        self._pairs = tables.merge_pairs
        self._ranks, self._results = tables.merge_ranks, tables.merge_results
        self._byte_tokens = tables.byte_tokens.tolist()
        self._ends, self._bytes = tables.token_ends, tables.token_bytes
        self._sorted = tables.sorted_tokens
        self.vocab_size = len(self._ends) - 1
        added = facts.added_tokens
        self.added_tokens: dict[str, int] = {token.content: token.id for token in added}
        self._special = frozenset(token.id for token in added if token.special)
        self._raw_added = _alternation(t.content for t in added if not t.normalized)
        self._normalised_added = _alternation(t.content for t in added if t.normalized)
        starts, flags = np.asarray(tables.class_starts), np.asarray(tables.class_flags)
        self.has_known_patterns = translated_patterns().issuperset(facts.patterns)
        """Whether `encode` may be called: an unknown pattern might take unlimited time."""
        patterns = facts.patterns if self.has_known_patterns else ()
        self._splitter = PieceSplitter(starts, flags, patterns, facts.normalizer)

    @classmethod
    def open(cls, path: Path) -> TableTokenizer:
        """Read the tables of a file. Raises UserError for a damaged file or a newer format."""
        try:
            tables, metadata = _read_tables(path)
            if documents.parse(metadata, _Format, path, _REMEDY).format > TABLES_FORMAT:
                raise UserError(f"{path} was written by a newer microvlm; upgrade the package.")
            return cls(path, tables, documents.parse(metadata, TableFacts, path, _REMEDY))
        except (OSError, ValueError) as error:
            reason = str(error) if type(error) is ValueError else "it cannot be read"
            raise UserError(f"{path} is damaged: {_REMEDY} ({reason}).") from None

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


def _check_tables(tables: Tables, facts: TableFacts) -> None:
    """Raise ValueError unless every length, offset and id fits, so that no look-up can fail later."""
    pairs, results = np.asarray(tables.merge_pairs), np.asarray(tables.merge_results)
    ends, starts = np.asarray(tables.token_ends), np.asarray(tables.class_starts)
    tokens = len(ends) - 1
    other_ids = [np.asarray(tables.byte_tokens), results, *_optional(tables.sorted_tokens)]
    added_ids = [token.id for token in facts.added_tokens]
    if len({len(pairs), len(tables.merge_ranks), len(results)}) != 1 or len(tables.byte_tokens) != 256:
        raise ValueError("lengths do not agree")
    if tokens < 1 or ends[0] != 0 or not _ascends(ends, or_equal=True) or ends[-1] != len(tables.token_bytes):
        raise ValueError("the ends of the tokens do not fit their bytes")
    if any(len(ids) and int(ids.max()) >= tokens for ids in other_ids) or max(added_ids, default=0) >= tokens:
        raise ValueError("an id is not one of a token")
    if not _ascends(pairs):
        raise ValueError("the merges are not in order")
    if len(pairs) and (int(pairs[-1] >> 32) >= tokens or int((pairs & 0xFFFFFFFF).max()) >= tokens):
        raise ValueError("a merge is not of two tokens")
    if len(tables.class_flags) != len(starts) or not len(starts) or starts[0] != 0 or not _ascends(starts):
        raise ValueError("the runs of code points are not in order")
    if starts[-1] >= _CODE_POINTS or int(np.asarray(tables.class_flags).max()) > CLASS_FLAGS:
        raise ValueError("a class of code points is unknown")


def _optional(values: memoryview | None) -> list[np.ndarray]:
    return [] if values is None else [np.asarray(values)]


def _ascends(values: np.ndarray, or_equal: bool = False) -> bool:
    return bool((values[1:] >= values[:-1]).all() if or_equal else (values[1:] > values[:-1]).all())


def _alternation(contents: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that matches any of the texts, the longest first like the library; None without texts."""
    ordered = sorted(contents, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _split(pattern: re.Pattern[str] | None, text: str) -> list[tuple[bool, str]]:
    """Split `text` by a pattern -> (whether the part matched, part), in order."""
    parts = [text] if pattern is None else pattern.split(text)
    return [(index % 2 == 1, part) for index, part in enumerate(parts) if part]


def _read_tables(path: Path) -> tuple[Tables, str]:
    """Read a safetensors file -> (views of its tensors, metadata). Raises ValueError, UserError and OSError."""
    # Not mapped: the system kills a process that reads a mapped file which was cut meanwhile, and only checked values
    # may be looked up. The check reads every page anyway, so that memory differs by kind alone: 1.3 MB for 50,000
    # tokens and 4 MB for Qwen's 151,643 are anonymous, where the library takes 60.
    whole = memoryview(documents.read_file(path))
    start = 8 + int.from_bytes(whole[:8], "little")
    if start > len(whole):
        raise ValueError("its header is cut")
    header = documents.parse(bytes(whole[8:start]), _Header, path, _REMEDY)

    def view(tensor: _Tensor, code: Literal["Q", "I", "B"]) -> memoryview:
        first, last = tensor.data_offsets
        size = {"Q": 8, "I": 4, "B": 1}[code]
        if last > len(whole) - start or last - first != size * tensor.shape[0]:
            raise ValueError("a tensor lies outside the file")
        return whole[start + first : start + last].cast(code)

    tables = Tables(
        view(header.merge_pairs, "Q"),
        view(header.merge_ranks, "I"),
        view(header.merge_results, "I"),
        view(header.byte_tokens, "I"),
        view(header.token_ends, "I"),
        view(header.token_bytes, "B"),
        view(header.class_starts, "I"),
        view(header.class_flags, "B"),
        None if header.sorted_tokens is None else view(header.sorted_tokens, "I"),
    )
    return tables, header.metadata.tokenizer
