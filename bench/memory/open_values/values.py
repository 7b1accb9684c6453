"""Values made by seed that no training has seen: names, words with digits, phrases, numbers, other scripts."""

from __future__ import annotations

import numpy as np

KINDS = ("name", "word", "phrase", "number")
_SYLLABLE_LIST = "ka le mi no ru sa ti vo za dre bel fin gor hul jas kir lom nev pra sto tur wen yol"
_SYLLABLES = tuple(_SYLLABLE_LIST.split())
_WORD_LIST = """
tulip river stone lantern velvet copper maple harbor thunder pillow anchor violin pepper glacier saddle meadow cactus
ribbon falcon marble key pot red blue old new under behind left right shelf second third neighbour dentist friday
train ticket seven green window upstairs spare cellar door before after small heavy borrowed
"""
_WORDS = tuple(_WORD_LIST.split())
_OTHER_SCRIPTS = ("абвгдежзиклмнопрстуфхцшэюя", "αβγδεζηθικλμνξοπρστυφχψω", "עברגדהוזחטיכלמנסעפצקרשת")


def open_value(kind: str, rng: np.random.Generator) -> str:
    """One value of one of `KINDS`; every eighth name is in another script than Latin."""
    if kind == "name":
        if rng.random() < 1 / 8:
            letters = list(_OTHER_SCRIPTS[int(rng.integers(len(_OTHER_SCRIPTS)))])
            return "".join(rng.choice(letters, int(rng.integers(3, 9))))
        return " ".join(
            "".join(rng.choice(_SYLLABLES, int(rng.integers(2, 4)))).title()
            for _ in range(int(rng.integers(1, 3)))
        )
    if kind == "word":
        return f"{rng.choice(_WORDS)}{int(rng.integers(10, 10_000))}"
    if kind == "phrase":
        return " ".join(rng.choice(_WORDS, int(rng.integers(3, 8))))
    if kind == "number":
        return " ".join(str(int(rng.integers(10_000))) for _ in range(int(rng.integers(1, 4))))
    raise ValueError(f"no kind of value: {kind}")


def open_values(count: int, rng: np.random.Generator) -> list[str]:
    """`count` different values, of all kinds in turn."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[open_value(KINDS[len(values) % len(KINDS)], rng)] = None
    return list(values)
