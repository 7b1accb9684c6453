"""Rules that a wording written by a language model must keep to be taken as a wording of its kind."""

from __future__ import annotations

import re

from microvlm.training.photo.language.held_out import words
from microvlm.training.photo.language.wrappings import SIDES_OF

EXAMPLE_NAMES: dict[str, dict[str, str]] = {
    "what_at": {"side": "on the left"},
    "what_beside": {"x": "teapot", "side": "to the left of"},
    "between": {"x": "teapot", "y": "lamp"},
    "where": {"x": "teapot"},
    "how_many_of": {"x": "teapot"},
    "colour_of": {"x": "teapot"},
    "is_there": {"x": "teapot"},
    "is_colour": {"x": "teapot", "colour": "green"},
    "is_at": {"x": "teapot", "y": "lamp", "side": "to the left of"},
    "is_it": {"x": "teapot"},
}
"""What stands for the placeholders of a kind while the model writes; kinds not named have none."""
for _kind in ("describe", "what", "how_many", "colour", "ground"):
    EXAMPLE_NAMES[_kind] = {}
for _kind in ("whose", "name_of", "where_from", "when", "code", "price", "fact", "not_understood"):
    EXAMPLE_NAMES[_kind] = {"x": "teapot"}

MIN_WORDS, MAX_WORDS = 2, 14
MAX_FORMS = 90
"""The most forms of one kind that are kept, the first ones."""

_WH = r"(what|which|where|who|whose|whom|when|how|why)"
_KEYS: dict[str, tuple[str, ...]] = {
    "describe": (
        r"\b(see|describe|description|caption|show|shown|shows|scene|picture|image|photo|happening|going on)\b",
    ),
    "what": (r"\b(what|which|name|identify|recognise|guess)\b", r"\b(this|it|that|thing|object|item)\b"),
    "what_at": (r"\{side\}", r"\b(what|which|name|describe|identify|find)\b"),
    "what_beside": (r"\{side\} the \{x\}", r"\b(what|which|name|describe|identify|find)\b"),
    "between": (r"\bbetween\b", r"\{x\}.*\{y\}", r"\b(what|which|name|describe|identify|find)\b"),
    "where": (r"\{x\}", r"\b(where|location|position|locate|side|find)\b"),
    "how_many": (r"\b(how many|number|count|total)\b",),
    "how_many_of": (r"\b(how many|number|count|total)\b", r"\{x\}s"),
    "colour_of": (r"\b(colour|shade|hue|colou?red|tint)\b", r"\{x\}"),
    "colour": (r"\b(colour|shade|hue|tint|coloured)\b",),
    "ground": (r"\b(colour|shade|hue|tint|coloured)\b", r"\b(background|ground|backdrop|behind)\b"),
    "is_there": (r"\{x\}", r"^(is|are|do|does|can|could|has|have|tell me if|check)\b"),
    "is_colour": (r"\{x\}", r"\{colour\}", r"^(is|are|do|does|can|would|has|tell me if|check)\b"),
    "is_at": (r"\{x\}.*\{side\} the \{y\}", r"^(is|are|do|does|can|would|tell me if|check)\b"),
    "is_it": (
        r"\ba \{x\}",
        r"^(is|are|do|does|can|could|would|tell me if|check)\b",
        r"\b(this|it|that|thing|object|item)\b",
    ),
    "not_understood": (rf"\b({_WH[1:-1]}|is|are|do|does|can|will|should|tell|write|play)\b",),
    "whose": (r"\b(whose|who|owner|owns|belong|belongs|owned|whom)\b", r"\b(this|it|that|\{x\}|its)\b"),
    "name_of": (r"\b(name|called|call|nickname|named)\b", r"\b(this|it|that|\{x\}|its|his|her)\b"),
    "where_from": (r"\b(where|origin|source|country|place|shop|city)\b", r"\b(this|it|that|\{x\}|its)\b"),
    "when": (r"\b(when|date|day|year|month|how long ago)\b", r"\b(this|it|that|\{x\}|its)\b"),
    "code": (r"\b(code|number|pin|password|id)\b", r"\b(this|it|that|\{x\}|its)\b"),
    "price": (r"\b(cost|costs|price|pay|paid|how much|worth|spend|spent)\b", r"\b(this|it|that|\{x\}|its)\b"),
    "fact": (
        r"\b(know|remember|say|said|tell|told|note|memory|fact|about|information)\b",
        r"\b(this|it|that|\{x\})\b",
    ),
}
_ASKS = {
    "colour": r"\b(colour|hue|shade|tint|coloured)\b",
    "count": r"\b(how many|number|count|total)\b",
    "place": r"\b(where|location|position|locate)\b",
    "time": r"\b(when|date|year|month)\b",
    "money": r"\b(cost|price|pay|paid|worth|much)\b",
    "owner": r"\b(who|whose|whom|owner|owns?|belongs?)\b",
    "manner": r"\b(why|how (?!many|do you call|would you|can you|is it called|is this called|much))",
    "side": r"\b(left|right|above|below|top|bottom|under|beneath|over|middle|between|"
    r"next to|beside|near|behind|front|inside|opposite)\b",
    "ground": r"\b(background|ground|backdrop|behind)\b",
}
"""What a question asks for, seen from its words: a wording must ask for nothing that its kind does not."""
_MAY_ASK: dict[str, frozenset[str]] = {
    "how_many": frozenset({"count"}),
    "how_many_of": frozenset({"count"}),
    "colour": frozenset({"colour"}),
    "colour_of": frozenset({"colour"}),
    "is_colour": frozenset({"colour"}),
    "ground": frozenset({"colour", "ground", "side"}),
    "where": frozenset({"place", "side"}),
    "between": frozenset({"side"}),
    "whose": frozenset({"owner"}),
    "name_of": frozenset({"owner", "manner"}),
    "where_from": frozenset({"place", "owner"}),
    "when": frozenset({"time"}),
    "code": frozenset({"count"}),
    "price": frozenset({"money"}),
    "fact": frozenset(),
}
_STRANGE = re.compile(
    r"\b(not|never|isn't|don't|doesn't|my favourite|and why|or the|same|difference|made of|shape|size|material|handle|"
    r"lid|spout|table|kitchen|tea|water|room|house|window|door|wall|floor|used for|purpose|meaning|teapot|lamp|green|"
    r"blue|red|yellow|white|black|please|sentence|word|words|synonym|question|answer|following|example|language)\b"
)
_FUNCTION_WORDS = frozenset(
    words("""
    a an the this that it its these those them they he she his her here there what which who whom whose
    where when how is are was were be been being am do does did can could may might will would should has in
    on at of to for from with by as and or if whether you i we me us my your our one any some all so please
    tell me picture image photo is not yes no right or now then really exactly just say know let s
""")
)
_SAME_WORDS = {
    "things": "thing",
    "object": "thing",
    "objects": "thing",
    "thing": "thing",
    "item": "thing",
    "items": "thing",
    "colours": "colour",
    "has": "have",
    "seen": "see",
    "shows": "show",
    "shown": "show",
    "looks": "look",
    "looking": "look",
    "seems": "seem",
    "appears": "appear",
    "contains": "contain",
    "lies": "lie",
    "stands": "stand",
    "sits": "sit",
    "belongs": "belong",
    "owns": "own",
    "costs": "cost",
    "paid": "pay",
    "bought": "buy",
    "got": "get",
    "found": "find",
    "told": "tell",
    "named": "name",
    "called": "call",
    "comes": "come",
    "came": "come",
    "kept": "keep",
    "saved": "save",
    "noted": "note",
    "wrote": "write",
}


def concrete(text: str, names: dict[str, str]) -> str:
    """`text` with the example names in place of its placeholders."""
    if "side" in names:
        text = re.sub(r"\bthe \{side\}", "the left", text)
    return text.format(**names)


def main_words(form: str) -> frozenset[str]:
    """The words of a form (`clause text`) that make its family: without function words, inflections joined."""
    text = re.sub(r"\{(\w+)\}('s|s\b)?", r" \1_ ", form[2:])
    words = (_SAME_WORDS.get(word, word) for word in re.findall(r"[a-z_]+", text))
    return frozenset(word for word in words if word not in _FUNCTION_WORDS)


def to_form(kind: str, line: str) -> str | None:
    """A line of the model as a form, `clause text` with placeholders; None where it breaks a rule of its kind."""
    text = line.strip().lower().replace("\u2019", "'")
    if not text.isascii() or not re.fullmatch(r"[a-z' ,\-]+[?.!]?", text):
        return None
    asks = text.endswith("?")
    text = re.sub(r"\bcolor", "colour", text.rstrip("?.! ")).replace("recognize", "recognise")
    text = re.sub(r"^(please|so|and|but|now|well|ok|hey),? ", "", text)
    text = re.sub(r"\b(what|where|who|it|that|there)'s\b", r"\1 is", text)
    names = EXAMPLE_NAMES[kind]
    if "side" in names:
        relations = "|".join(
            sorted(SIDES_OF["train"]["left"] + SIDES_OF["held_out"]["left"], key=len, reverse=True)
        )
        if kind == "what_at":
            text = re.sub(r"\b(on|to|at) the left( side)?\b(?! of)", "{side}", text)
        else:
            text = re.sub(rf"\b({relations})\b", "{side}", text)
    for key in ("x", "y", "colour"):
        if key in names:
            text = re.sub(rf"\b{names[key]}(?=s?\b)", f"{{{key}}}", text)
    text = re.sub(r"\ban? \{x\}s", "{x}s", text)
    if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
        return None
    clause = "m"
    start = text.split()[0]
    if asks or re.match(rf"({_WH[1:-1]}|is|are|does|do|can|could|would|did|has|have)$", start):
        clause = "q"
    match = re.match(
        rf"(?:can you |could you |would you )?(?:please )?tell me ({_WH}|if|whether)\b(.*)$", text
    )
    if match:
        clause, text = "i", text[match.start(1) :]
    form = f"{clause} {text}"
    return form if keeps_meaning(kind, form) else None


def keeps_meaning(kind: str, form: str) -> bool:
    clause, text = form[0], form[2:]
    wanted = set(EXAMPLE_NAMES[kind])
    held = set(re.findall(r"\{(\w+)\}", text))
    optional = kind in ("whose", "name_of", "where_from", "when", "code", "price", "fact", "not_understood")
    if (
        held - wanted
        or (not optional and held != wanted)
        or any(text.count(f"{{{key}}}") > 1 for key in held)
    ):
        return False
    test = text if clause != "i" else f"tell me {text}"
    if not all(re.search(key, test) for key in _KEYS[kind]):
        return False
    if kind == "not_understood":
        return True
    plain = re.sub(r"\{\w+\}", " ", text)
    may = _MAY_ASK.get(kind, frozenset())
    if any(name not in may and re.search(pattern, plain) for name, pattern in _ASKS.items()):
        return False
    plural_names = "{x}s" in text or "{y}s" in text
    return (
        not _STRANGE.search(plain) and (kind in ("how_many_of",) or not plural_names) and text.count(",") <= 1
    )


def accepted_forms(kind: str, lines: list[str]) -> list[str]:
    """The forms of `lines` that keep the rules, each once, at most MAX_FORMS."""
    return list(dict.fromkeys(filter(None, (to_form(kind, line) for line in lines))))[:MAX_FORMS]


def off_topic_forms(lines: list[str], known_words: set[str]) -> list[str]:
    """Questions among `lines` that have left their kind: they have two or more words that are not `known_words`.

    known_words : the words of all kinds that have answers. The questions are wordings of `not_understood`, once
    it is read that a picture does not answer them.
    """
    forms = []
    for line in lines:
        text = line.strip().lower().replace("teapots", "{x}s").replace("teapot", "{x}")
        if not re.fullmatch(r"[a-z{}' ,]+\?", text) or not 3 <= len(text.split()) <= MAX_WORDS:
            continue
        text = re.sub(r"\bcolor", "colour", text.rstrip("?"))
        names = set(EXAMPLE_NAMES["is_at"].values()) | {"left"}
        if len(set(re.findall(r"[a-z']+", re.sub(r"\{x\}('s|s\b)?", " ", text))) - known_words - names) >= 2:
            forms.append(f"q {text}")
    return list(dict.fromkeys(forms))
