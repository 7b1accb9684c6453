"""The notation of the hand-written grammars: one family of wordings a line, expanded to plain forms.

A line is `family: form; form; ...`. Wordings of one family are paraphrases that share their main words; a family is
trained on or held out as a whole. A form starts with the letter of its clause:

    q  a question                   "what is this"
    i  an indirect question         "what this is"          (follows "tell me")
    m  an imperative                "name this"             (follows "please")
    n  a noun phrase                "the name of this"      (follows "tell me", "what is")
    s  a statement                  "i forgot its name"     (stands alone)

`(a/b/c)` is a choice, `(a/)` an optional part, `@name` one of MACROS. Placeholders are kept as they are: `{x}`, `{y}`
(object names, after "the", "a" or before a plural s), `{colour}`, `{side}`.
"""

from __future__ import annotations

import re

CLAUSES = ("q", "i", "m", "n", "s")
MACROS = {
    "pic": "(the/this) (picture/image/photo)",
    "inpic": "(in the picture/in this picture/in the image/in this photo)",
    "thing": "(thing/object)",
    "things": "(things/objects)",
    "this": "(this/it/that)",
}
_CHOICE = re.compile(r"\(([^()]*)\)")
_MACRO = re.compile(r"@([a-z]+)")


def expand(notation: str) -> list[str]:
    """Every plain text of a notation, in the order of its choices, each once.

    Raises KeyError for a macro that does not exist.
    """
    notation = _MACRO.sub(lambda match: MACROS[match.group(1)], notation)
    texts = [notation]
    while any(_CHOICE.search(text) for text in texts):
        expanded = []
        for text in texts:
            match = _CHOICE.search(text)
            if match is None:
                expanded.append(text)
                continue
            expanded += [
                text[: match.start()] + option + text[match.end() :] for option in match.group(1).split("/")
            ]
        texts = expanded
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))


def read_grammar(text: str) -> dict[str, list[str]]:
    """Family name -> its forms, each `clause text`, of a grammar in this module's notation.

    Raises ValueError for a line without a family name, an unknown clause or a family that occurs twice.
    """
    families: dict[str, list[str]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, separator, right = line.partition(":")
        if not separator or name in families:
            raise ValueError(f"no family name, or one that occurs twice: {line!r}")
        forms: list[str] = []
        for part in right.split(";"):
            clause, _, notation = part.strip().partition(" ")
            if clause not in CLAUSES or not notation:
                raise ValueError(f"a form of {name!r} does not start with one of {CLAUSES}: {part!r}")
            forms += [f"{clause} {form}" for form in expand(notation)]
        families[name] = list(dict.fromkeys(forms))
    return families
