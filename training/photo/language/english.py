"""English nouns in sentences: a or an, plurals, possessives, and verbs of nouns that are always plural.

Rules with lists of exceptions, made for names of things; no dictionary.
"""

from __future__ import annotations

import re

from microvlm.training.photo.language.held_out import words

_SOUNDS_LIKE_CONSONANT = re.compile(
    r"(eu|ewe|one\b|once|ouija|ubi|uk[ru]|ur[ai]|us[aeiu]|ut[aeio]|uni(?![nmd])|u(sb|fo|k|s|n)\b)"
)
_SOUNDS_LIKE_VOWEL = re.compile(
    r"(hour|honest|honou?r|heir|herb\b|(mp3|lp|lcd|led|rv|suv|sms|hd|fm|mri|ssd|nft)\b)"
)
_SPELLED_AN = set("aefhilmnorsx")
"""Letters whose names start with a vowel: an f, an x-ray."""

PLURAL_ONLY = frozenset(
    words("""
    binoculars breeches chopsticks clippers clothes goggles headphones jeans knickers leggings overalls
    pajamas pants pliers pyjamas scissors shears shorts spectacles stairs sunglasses swimming trunks tights
    tongs trousers tweezers glasses earphones eyeglasses maracas handcuffs dungarees
""")
) | {"swimming trunks"}
"""Heads that take plural verbs and no a."""
_NOT_IN_PAIRS = frozenset({"clothes", "stairs", "maracas"})

MASS = frozenset(
    words("""
    bread broccoli butter cheese chocolate coffee corn dough flour fruit furniture garlic grass guacamole
    hay honey jewellery jewelry juice lettuce luggage meat milk money music oil paper popcorn rice salt sand
    seafood silk smoke snow soap soup spaghetti steam sugar sushi tea toilet tissue velvet water wine wood
    wool yogurt yoghurt bacon ginger cauliflower fire lightning rain fog ice spinach asparagus celery
    equipment clothing chainmail
""")
) | {"toilet tissue", "ice cream", "chain mail", "french fries", "mashed potato"}
"""Names without a plural: "some bread", "how much" aside."""

_IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "louse": "lice",
    "ox": "oxen",
    "die": "dice",
    "cactus": "cactuses",
    "bus": "buses",
    "minibus": "minibuses",
    "trolleybus": "trolleybuses",
    "gas": "gases",
    "quiz": "quizzes",
    "matrix": "matrices",
    "axis": "axes",
    "crisis": "crises",
    "fungus": "fungi",
    "loaf": "loaves",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "shelf": "shelves",
    "bookshelf": "bookshelves",
    "calf": "calves",
    "half": "halves",
    "scarf": "scarves",
    "elf": "elves",
    "thief": "thieves",
    "wife": "wives",
    "hoof": "hooves",
    "life": "lives",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "hero": "heroes",
    "echo": "echoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "tornado": "tornadoes",
    "buffalo": "buffaloes",
    "torpedo": "torpedoes",
    "mosquito": "mosquitoes",
    "ibex": "ibexes",
    "passer-by": "passers-by",
    "passerby": "passersby",
}
_UNCHANGED = frozenset(
    words("""
    aircraft bison cod crossroads deer fish goldfish jellyfish lionfish moose salmon series sheep shrimp
    species squid starfish swine trout tuna barracouta puffer sturgeon swordfish catfish dice crayfish
    anemone-fish spacecraft hovercraft watercraft pants means
""")
) - {"pants"}
_HARD_CH = frozenset({"stomach", "monarch", "matriarch", "patriarch", "eunuch"})
_LINKS = re.compile(r" (of|in|on|with|for|to|at|from|without) ")
_MALE = re.compile(r"^(?!.*(human|german|roman|shaman|talisman|ottoman|caiman)$).*[a-z]{2,}man$")


def article(words: str) -> str:
    """`a` or `an`, as it is said before `words`."""
    first = words.lower().lstrip("'\"")
    if re.match(r"[a-z]([-. ]|$)", first):
        return "an" if first[0] in _SPELLED_AN else "a"
    if re.match(r"(8|11(?!\d)|18(?!\d))", first):
        return "an"
    if _SOUNDS_LIKE_VOWEL.match(first):
        return "an"
    return "an" if first[:1] in tuple("aeiou") and not _SOUNDS_LIKE_CONSONANT.match(first) else "a"


def head(noun: str) -> str:
    """The word that is put into the plural: the last one before a preposition."""
    return _LINKS.split(noun, maxsplit=1)[0].split(" ")[-1]


def is_plural_only(noun: str) -> bool:
    """Whether the noun is always plural ("scissors")."""
    return head(noun) in PLURAL_ONLY or noun in PLURAL_ONLY


def is_mass(noun: str) -> bool:
    """Whether the noun has neither an article nor a plural ("bread", "ice cream")."""
    return noun in MASS or (" " not in noun and head(noun) in MASS)


def with_article(noun: str) -> str:
    """The noun with a or an; "some" for a mass, "a pair of" for what comes in pairs."""
    if is_plural_only(noun):
        return f"some {noun}" if head(noun) in _NOT_IN_PAIRS else f"a pair of {noun}"
    if is_mass(noun):
        return f"some {noun}"
    return f"{article(noun)} {noun}"


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _UNCHANGED or word in PLURAL_ONLY:
        return word
    if _MALE.match(word):
        return word[:-3] + "men"
    if re.search(r"(s|x|z|ch|sh)$", word) and word not in _HARD_CH:
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + "s"


def plural(noun: str) -> str:
    """The plural of a name of one or more words: "slices of pizza", "tennis balls", "scissors"."""
    if is_mass(noun) or is_plural_only(noun):
        return noun
    match = _LINKS.search(noun)
    start, rest = (noun, "") if match is None else (noun[: match.start()], noun[match.start() :])
    before, space, last = start.rpartition(" ")
    hyphen = re.match(r"([a-z]+)(-(?:in|of|on)-.*)$", last)
    changed = _plural_word(hyphen[1]) + hyphen[2] if hyphen else _plural_word(last)
    return before + space + changed + rest


def possessive(noun: str) -> str:
    """The noun with 's, or an apostrophe alone after a plural s."""
    return noun + ("'" if is_plural_only(noun) and noun.endswith("s") else "'s")


_AGREEMENT = (
    (r"\bis the \{x\}(?!')", "are the {x}"),
    (r"\bwas the \{x\}(?!')", "were the {x}"),
    (r"\bdoes the \{x\}", "do the {x}"),
    (r"(?<!of )\bthe \{x\} (really )?is\b", r"the {x} \1are"),
    (r"(?<!of )\bthe \{x\} has\b", "the {x} have"),
    (r"(?<!of )\bthe \{x\} (look|seem|appear|stand|lie|sit)s\b", r"the {x} \1"),
    (r"\bthis \{x\}", "these {x}"),
    (r"\bis these \{x\}(?!')", "are these {x}"),
    (r"\bdoes these \{x\}", "do these {x}"),
    (r"\bthese \{x\} is\b", "these {x} are"),
    (r"\ba \{x\} is\b", "a {x} are"),
)


def agree(template: str) -> str:
    """The template with the verbs of `{x}` in the plural, for nouns that are always plural."""
    for pattern, replacement in _AGREEMENT:
        template = re.sub(pattern, replacement, template)
    return template
