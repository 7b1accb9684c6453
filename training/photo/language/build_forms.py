"""Builds `question_forms.json` from the grammars and from the lines that a language model wrote.

    python -m microvlm.training.photo.language.build_forms [raw.json]

With `raw.json` of `write_forms`, its lines are checked by `paraphrase_checks` first, and those that pass are written to
`model_lines.json`, less the ones that are `rejected` there: read and found wrong. Without it, the committed
`model_lines.json` is taken as it is. The build has no random choices.

Families of one kind that share their main words become one family, so that no held-out wording is a trained one with
"which" for "what". A family is held out in the order of its hash, until half of a kind's forms are, as long as every
word of it occurs in trained wordings of the same group of kinds: a held-out question is a new arrangement of known
words. The first family of a kind, its plainest wordings, is always trained, unless `EVALUATED` has one of them.
Questions without an answer have topics, not paraphrases: there, held-out words may be new.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from microvlm.training.photo.language.grammars import GRAMMARS, GROUPS
from microvlm.training.photo.language.held_out import text_hash
from microvlm.training.photo.language.paraphrase_checks import accepted_forms, main_words, off_topic_forms
from microvlm.training.photo.language.wrappings import PLAIN, WRAPPINGS

FOLDER = Path(__file__).parent
FORMS = FOLDER / "question_forms.json"
MODEL_LINES = FOLDER / "model_lines.json"
TRAINED_FAMILIES = {"picture": 2, "kinds": 1, "memory": 1}
"""In how many other trained families of the group a word must occur for a family with that word to be held out."""
WORDS_FROM = {"kinds": "picture"}
"""Groups whose held-out wordings may also use the trained words of another group."""

EVALUATED = ("who owns this", "who is this from", "in which place is this", "how long have i had this")
"""Other wordings of facts that `microvlm-bench memory` asks for. Their families are held out."""

Families = dict[str, tuple[list[str], set[str]]]
"""Family name -> its forms (`clause text`) and who wrote them."""


def _merged(grammar: dict[str, list[str]], written: list[str]) -> Families:
    """The families of one kind: those that share the main words of any form are joined, under the first one's name."""
    rows = [(name, form, "grammar") for name, forms in grammar.items() for form in forms]
    known = {form[2:] for _, form, _ in rows}
    rows += [
        (" ".join(sorted(main_words(form))) or "bare", form, "smollm2")
        for form in written
        if form[2:] not in known
    ]
    owner: dict[frozenset[str], str] = {}
    joined: dict[str, str] = {}

    def root(name: str) -> str:
        while joined.get(name, name) != name:
            name = joined[name]
        return name

    for name, form, author in rows:
        # A family that the model's words name is not the grammar's family of the same name.
        name = f"{author}: {name}" if author == "smollm2" else name
        words = main_words(form)
        first = owner.setdefault(words, name)
        if root(first) != root(name):
            joined[root(name)] = root(first)
    families: Families = {}
    for name, form, author in rows:
        name = root(f"{author}: {name}" if author == "smollm2" else name)
        forms, authors = families.setdefault(name, ([], set()))
        if form not in forms:
            forms.append(form)
            authors.add(author)
    return families


def _by_question_word(grammars: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    """The grammars with `fact_text` in parts, one for each word that asks: a "where" is no paraphrase of a "when"."""
    parts: dict[str, dict[str, list[str]]] = {}
    for kind, grammar in grammars.items():
        for name, forms in grammar.items():
            part = f"{kind} {name.split(' ')[0]}" if kind == "fact_text" else kind
            parts.setdefault(part, {})[name] = forms
    return parts


def _words(forms: list[str]) -> set[str]:
    return {word for form in forms for word in re.findall(r"[a-z']+", re.sub(r"\{.*?\}", " ", form[2:]))}


def _split_by_topic(families: Families) -> dict[str, str]:
    """Family name -> split, by hash alone, until half of the forms are held out."""
    splits, size, total = {}, 0, sum(len(forms) for forms, _ in families.values())
    for name in sorted(families, key=lambda name: text_hash("topic", name)):
        splits[name] = "held_out" if size + len(families[name][0]) <= total / 2 else "train"
        size += len(families[name][0]) if splits[name] == "held_out" else 0
    return splits


def _split_by_words(
    kinds: dict[str, Families], others: int, known_words: set[str]
) -> dict[str, dict[str, str]]:
    """Kind -> family name -> split, of one group of kinds (see the module); `others`: a value of TRAINED_FAMILIES.

    known_words : words that the training of other groups teaches.
    """
    trained = Counter(
        word for families in kinds.values() for forms, _ in families.values() for word in _words(forms)
    )
    # Wrappings are part of training too.
    for wrappings in (PLAIN, WRAPPINGS["train"]):
        trained.update(dict.fromkeys(_words([f"w {w}" for row in wrappings.values() for w in row]), 9))
    trained.update(dict.fromkeys(known_words, 9))
    splits = {kind: dict.fromkeys(families, "train") for kind, families in kinds.items()}
    sizes = {kind: [0, sum(len(forms) for forms, _ in families.values())] for kind, families in kinds.items()}
    order = [(kind, name) for kind, families in kinds.items() for name in families]
    evaluated = {
        (kind, name) for kind, name in order if any(form[2:] in EVALUATED for form in kinds[kind][name][0])
    }
    for kind, name in sorted(
        order, key=lambda row: (row not in evaluated, text_hash("family", "|".join(row)))
    ):
        forms = kinds[kind][name][0]
        words = _words(forms)
        fits = sizes[kind][0] + len(forms) <= 0.55 * sizes[kind][1]
        plainest = name == next(iter(kinds[kind]))
        known = all(trained[word] > others for word in words)
        if (kind, name) in evaluated or (fits and not plainest and known):
            splits[kind][name] = "held_out"
            sizes[kind][0] += len(forms)
            trained.subtract(words)
    return splits


def build(written: dict[str, list[str]]) -> dict:
    """The document of `question_forms.json`; `written`: kind -> the model's forms, `clause text`."""
    kinds = {
        kind: _merged(grammar, written.get(kind, [])) for kind, grammar in _by_question_word(GRAMMARS).items()
    }
    splits: dict[str, dict[str, str]] = {}
    for group, names in GROUPS.items():
        members = {kind: families for kind, families in kinds.items() if kind.split(" ")[0] in names}
        if group == "unanswerable":
            splits.update({kind: _split_by_topic(families) for kind, families in members.items()})
        else:
            known = {
                word
                for kind in GROUPS.get(WORDS_FROM.get(group, ""), ())
                for name, (forms, _) in kinds[kind].items()
                if splits[kind][name] == "train"
                for word in _words(forms)
            }
            splits.update(_split_by_words(members, TRAINED_FAMILIES[group], known))
    return {
        "format": "microvlm question forms 1",
        "by": {
            "grammar": "written by hand: the grammars of this folder",
            "smollm2": "written by SmolLM2-135M-Instruct, checked by paraphrase_checks and read",
        },
        "kinds": {
            kind: [
                {"family": name, "by": "+".join(sorted(by)), "split": splits[part][name], "forms": forms}
                for part, families in kinds.items()
                if part.split(" ")[0] == kind
                for name, (forms, by) in families.items()
            ]
            for kind in GRAMMARS
        },
    }


def new_forms(raw: dict[str, list[str]]) -> dict[str, list[str]]:
    """Kind -> the forms of a model's lines that keep the rules and are in no grammar; `raw`: kind -> lines."""
    answered = [
        forms for group in TRAINED_FAMILIES for kind in GROUPS[group].values() for forms in kind.values()
    ]
    known = {word for forms in answered for word in _words(forms)}
    there = {form[2:] for grammar in GRAMMARS.values() for forms in grammar.values() for form in forms}
    accepted = {kind: accepted_forms(kind, lines) for kind, lines in raw.items()}
    for lines in raw.values():
        accepted["not_understood"] = accepted.get("not_understood", []) + off_topic_forms(lines, known)
    return {
        kind: [form for form in dict.fromkeys(forms) if form[2:] not in there]
        for kind, forms in accepted.items()
    }


def document_text(document: dict) -> str:
    """The document as JSON, one family a line."""
    rows = {
        kind: ",\n".join(json.dumps(row) for row in families) for kind, families in document["kinds"].items()
    }
    body = ",\n".join(f'"{kind}": [\n{text}\n]' for kind, text in rows.items())
    head = json.dumps({key: value for key, value in document.items() if key != "kinds"}, indent=1)
    return f'{head[:-2]},\n "kinds": {{\n{body}\n}}\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", nargs="?", type=Path, help="lines of write_forms, to be checked")
    arguments = parser.parse_args()
    document = json.loads(MODEL_LINES.read_text(encoding="utf-8"))
    if arguments.raw:
        raw = json.loads(arguments.raw.read_text(encoding="utf-8"))
        rejected = document["rejected"]
        document["forms"] = {
            kind: [form for form in forms if form not in rejected.get(kind, [])]
            for kind, forms in new_forms(raw).items()
        }
        MODEL_LINES.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    FORMS.write_text(document_text(build(document["forms"])), encoding="utf-8")


if __name__ == "__main__":
    main()
