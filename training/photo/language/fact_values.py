"""Open values for facts: names, words, phrases, numbers, codes, dates, times, places, prices, by seed.

Training's and the tests' values are disjoint: a value belongs to a half by the hash of its text, whatever made it.
Words are from `value_words.json` (WordNet), some given names from the facts of `nano`, all else is written or invented.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from importlib import resources

import numpy as np

from microvlm.training.emoji.data.fact_texts import NAMES
from microvlm.training.photo.language.english import article, plural
from microvlm.training.photo.language.held_out import is_held_out, words

MAX_CHARACTERS = 48
"""The longest value."""
VALUE_OF_KIND = {
    "whose": "name",
    "name_of": "name",
    "where_from": "origin",
    "when": "date",
    "code": "code",
    "price": "price",
    "fact": "phrase",
}
"""Kind of a question about a shown picture -> the kind of value that answers it."""
_ROOMS = """
kitchen garage attic cellar garden office hall bedroom bathroom balcony shed car van boat library workshop studio school
pantry porch barn cabin laundry tent caravan nursery greenhouse gym
"""
_SPOTS = words("""
    drawer cupboard box basket shelf cabinet bag jar tin suitcase trunk bin tray chest locker pocket bucket
    crate
""")
_NEAR = ("behind", "under", "on", "beside", "near", "next to", "on top of", "below", "in front of", "inside")
_VERBS = words("""
    bring buy call carry catch check clean close cook cut draw feed find fix fold hide hold keep lend lift
    lock mend move open pack paint plant pull push read return save sell send show sort take turn wash water
    wrap write
""")
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_SEASONS = ["spring", "summer", "autumn", "winter"]
_UNITS = words("""
    kg grams metres cm litres miles km degrees percent pages watts volts bar minutes hours days euros
""")
_SHOPS = (
    "flea market",
    "toy shop",
    "book shop",
    "bakery",
    "museum shop",
    "market",
    "airport",
    "antique shop",
    "junk shop",
    "department store",
    "station",
    "harbour",
    "craft fair",
)
_ONSETS = words("""
    b br ch d dr f fl g gr h j k kl kr l m n p pl r s sh sk st t tr v w z
""")
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ee", "io", "ou"]
_CODAS = ["", "", "", *["l", "m", "n", "r", "s", "t", "k", "sh", "x"]]


@lru_cache(maxsize=1)
def value_words() -> dict[str, tuple[str, ...]]:
    """`nouns`, `adjectives`, `given_names`, `surnames` and `cities`."""
    document = json.loads(
        resources.files(__package__).joinpath("value_words.json").read_text(encoding="utf-8")
    )
    return {key: tuple(" ".join(lines).split()) for key, lines in document.items() if key != "source"}


@lru_cache(maxsize=1)
def given_names() -> tuple[str, ...]:
    return tuple(sorted({*NAMES, *value_words()["given_names"]}))


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(rng: np.random.Generator) -> str:
    return _pick(rng, value_words()["nouns"])


def _adjective(rng: np.random.Generator) -> str:
    return _pick(rng, value_words()["adjectives"])


def _invented(rng: np.random.Generator) -> str:
    """A word of two or three syllables that means nothing."""
    return "".join(
        _pick(rng, _ONSETS) + _pick(rng, _VOWELS) + _pick(rng, _CODAS) for _ in range(int(rng.integers(2, 4)))
    )


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join(chr(97 + int(letter)) for letter in rng.integers(26, size=count))


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(map(str, rng.integers(10, size=count)))


def _mixed(rng: np.random.Generator, count: int) -> str:
    return "".join(_pick(rng, list("abcdefghjkmnpqrstuvwxyz23456789")) for _ in range(count))


def _name(rng: np.random.Generator) -> str:
    given, surname = _pick(rng, given_names()), _pick(rng, value_words()["surnames"])
    title = _pick(rng, ["mr", "mrs", "ms", "dr", "aunt", "uncle", "old", "little"])
    family = surname if title in ("mr", "mrs", "ms", "dr") else given
    invented = _invented(rng)
    return _pick(
        rng, [given, given, invented, f"{given} {surname}", f"{title} {family}", f"{given} {invented}"]
    )


def _word(rng: np.random.Generator) -> str:
    return _pick(rng, [_noun(rng), _noun(rng), _adjective(rng), _invented(rng)])


def _phrase(rng: np.random.Generator) -> str:
    noun, other, third = _noun(rng), _noun(rng), _noun(rng)
    adjective, second = _adjective(rng), _adjective(rng)
    name, verb, city = _pick(rng, given_names()), _pick(rng, _VERBS), _pick(rng, value_words()["cities"])
    return _pick(
        rng,
        [
            f"{adjective} {noun}",
            f"{noun} and {other}",
            f"{adjective} and {second}",
            f"{article(adjective)} {adjective} {noun} from {city}",
            f"{noun}, {other} and {third}",
            f"a present from {name}",
            f"{verb} the {noun}",
            f"{verb} the {adjective} {noun} for {name}",
            f"never {verb} it with {article(noun)} {noun}",
            f"it smells of {noun}",
            f"{name} likes {plural(noun)}",
            f"as {adjective} as {article(noun)} {noun}",
            f"do not {verb} the {noun}",
            f"the {noun} of {name}",
            f"{name} and {_pick(rng, given_names())} made it",
            f"it needs {article(adjective)} {adjective} {noun}",
        ],
    )


def _number(rng: np.random.Generator) -> str:
    whole = str(int(rng.integers(10 ** int(rng.integers(1, 6)))))
    decimal = f"{int(rng.integers(1000))}.{_digits(rng, int(rng.integers(1, 3)))}"
    phone = f"0{_digits(rng, 3)} {_digits(rng, int(rng.integers(4, 7)))}"
    return _pick(rng, [whole, whole, decimal, f"{whole} {_pick(rng, _UNITS)}", phone, f"no. {whole}"])


def _code(rng: np.random.Generator) -> str:
    noun, digits = _noun(rng), _digits(rng, int(rng.integers(1, 5)))
    return _pick(
        rng,
        [
            noun + digits,
            _digits(rng, int(rng.integers(4, 7))),
            _mixed(rng, int(rng.integers(4, 9))),
            f"{_letters(rng, 2)}-{_digits(rng, int(rng.integers(3, 5)))}",
            f"{_letters(rng, 1)}{_digits(rng, 1)}-{_mixed(rng, 2)}-{_digits(rng, 2)}",
            f"{noun}-{_noun(rng)}-{digits}",
            f"{_pick(rng, given_names())}{digits}{_pick(rng, list('!#?*'))}",
        ],
    )


def _date(rng: np.random.Generator) -> str:
    day, month, year = int(rng.integers(1, 29)), int(rng.integers(12)), int(rng.integers(1950, 2030))
    name = _MONTHS[month]
    return _pick(
        rng,
        [
            f"{day} {name}",
            f"{name} {day}",
            f"{day} {name} {year}",
            f"{year}-{month + 1:02}-{day:02}",
            f"{day:02}.{month + 1:02}.{year}",
            f"{_pick(rng, _WEEKDAYS)}, {day} {name}",
            f"in {name} {year}",
            f"in {_pick(rng, _SEASONS)} {year}",
            f"on {_pick(rng, _WEEKDAYS)} at {int(rng.integers(1, 12))}",
        ],
    )


def _time(rng: np.random.Generator) -> str:
    hour, minute = int(rng.integers(24)), int(rng.integers(60))
    return _pick(
        rng,
        [
            f"{hour}:{minute:02}",
            f"at {hour}:{minute:02}",
            f"{hour % 12 + 1}.{minute:02} {_pick(rng, ['am', 'pm'])}",
        ],
    )


def _place(rng: np.random.Generator) -> str:
    room, spot, noun, adjective = _pick(rng, _ROOMS.split()), _pick(rng, _SPOTS), _noun(rng), _adjective(rng)
    near = _pick(rng, list(_NEAR))
    return _pick(
        rng,
        [
            f"in the {room} {spot}",
            f"{near} the {noun}",
            f"{near} the {noun} in the {room}",
            f"in the {adjective} {spot}",
            f"in {_pick(rng, given_names())}'s {_pick(rng, [room, spot])}",
            f"at {int(rng.integers(1, 200))} {noun} street",
            f"{near} the {adjective} {noun}",
        ],
    )


def _origin(rng: np.random.Generator) -> str:
    city, shop = _pick(rng, value_words()["cities"]), _pick(rng, list(_SHOPS))
    return _pick(
        rng,
        [
            city,
            f"{article(shop)} {shop} in {city}",
            f"the {shop} in {_noun(rng)} street",
            f"from {_pick(rng, given_names())}",
            f"{_pick(rng, given_names())}'s {_pick(rng, _ROOMS.split())}",
            f"the {_adjective(rng)} {_noun(rng)} shop",
            f"{_invented(rng)}",
        ],
    )


def _price(rng: np.random.Generator) -> str:
    euros, cents = int(rng.integers(1, 10 ** int(rng.integers(1, 5)))), int(rng.integers(100))
    money = _pick(rng, ["euros", "dollars", "pounds", "francs", "crowns", "yen"])
    return _pick(
        rng,
        [f"{euros} {money}", f"{euros}.{cents:02} {money}", f"${euros}.{cents:02}", f"{euros}.{cents:02}"],
    )


_MAKERS: dict[str, Callable[[np.random.Generator], str]] = {
    "name": _name,
    "word": _word,
    "phrase": _phrase,
    "number": _number,
    "code": _code,
    "date": _date,
    "time": _time,
    "place": _place,
    "origin": _origin,
    "price": _price,
}
VALUE_KINDS = tuple(_MAKERS)


def value_is_held_out(text: str) -> bool:
    """Whether a value belongs to the half that training never sees."""
    return is_held_out("value", text)


def fact_value(kind: str, rng: np.random.Generator, split: str = "train") -> str:
    """A random value of a kind of VALUE_KINDS, of the split's half. Raises ValueError for an unknown kind or split."""
    if kind not in _MAKERS:
        raise ValueError(f"kind must be one of {', '.join(VALUE_KINDS)}: {kind!r}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be one of train, held_out: {split!r}")
    while True:
        text = _MAKERS[kind](rng)
        if len(text) <= MAX_CHARACTERS and value_is_held_out(text) == (split == "held_out"):
            return text
