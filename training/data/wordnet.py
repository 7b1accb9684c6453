"""Reads nouns of a WordNet database: the words of a concept, and its hypernyms.

The format is WordNet's own, wndb(5WN). A line of `data.noun` starts at the byte that its first field says, which is
also the number in a wnid:

    02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 022 @ 02083346 n 0000 ... | a member of the genus Canis ...
    offset  file pos words (hexadecimal) (word, id) ...   pointers (decimal) (symbol offset pos fields) ... | gloss
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from microvlm.errors import UserError
from microvlm.formats import documents

DATA_FILE = "data.noun"
MOST_BYTES = 64_000_000
"""WordNet 3.0's nouns have 15.3 MB."""
_HYPERNYMS = ("@", "@i")
"""Pointers to what a concept is a kind of, and an instance of."""


class Concept(NamedTuple):
    """One synset."""

    words: tuple[str, ...]
    """With blanks."""
    hypernyms: tuple[int, ...]
    """Offsets of the concepts above."""


class WordNet:
    """The nouns of one database."""

    def __init__(self, folder: Path):
        """Read `data.noun` of a folder. Raises UserError for a folder without one."""
        self.path = folder / DATA_FILE
        try:
            self._content = documents.read_file(self.path, MOST_BYTES)
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no {DATA_FILE}: give the folder of WordNet 3.0's database (Debian's package "
                "wordnet-base has it in /usr/share/wordnet)."
            ) from None

    def concept(self, offset: int) -> Concept:
        """The concept at an offset. Raises KeyError where no line starts, and UserError for a damaged line."""
        end = self._content.find(b"\n", offset)
        line = self._content[offset : end if end >= 0 else None]
        if not line.startswith(b"%08d " % offset):
            raise KeyError(offset)
        try:
            fields = line.split(b" | ")[0].decode().split()
            count = int(fields[3], 16)
            words = fields[4 : 4 + 2 * count : 2]
            start = 5 + 2 * count
            pointers = [fields[at : at + 4] for at in range(start, start + 4 * int(fields[start - 1]), 4)]
            above = [
                int(where) for symbol, where, kind, _ in pointers if symbol in _HYPERNYMS and kind == "n"
            ]
        except (ValueError, IndexError):
            raise UserError(f"{self.path} is damaged at byte {offset}: install WordNet 3.0 again.") from None
        return Concept(tuple(word.replace("_", " ") for word in words), tuple(above))

    def above(self, offset: int) -> dict[int, int]:
        """Concepts above one, by offset, with the fewest steps to each, in the order of the steps."""
        steps = {offset: 0}
        queue = [offset]
        for current in queue:
            for higher in self.concept(current).hypernyms:
                if higher not in steps:
                    steps[higher] = steps[current] + 1
                    queue.append(higher)
        del steps[offset]
        return steps
