"""Facts with open values: what is written into a memory, how it is asked for again, and who else asks.

A fact is the answer to a question about a picture, to the captioning prompt about one, or to a question in words
alone. It is asked for with another view of the picture in other words. Strangers are questions that no fact answers: of
a picture that was never told of, of a known picture about something else or about what it shows, and in words alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from microvlm.training.photo.data.colours import NAMES as COLOURS
from microvlm.training.photo.language.fact_subjects import fact_subjects
from microvlm.training.photo.language.fact_values import VALUE_KINDS, fact_value
from microvlm.training.photo.language.question_forms import MEMORY_KINDS, PICTURE_KINDS, Split, question

VALUE_OF = {
    "whose": ("name",), "name_of": ("name", "word"), "where_from": ("origin", "place"), "when": ("date", "time"),
    "code": ("code", "number"), "price": ("price",), "giver": ("name",), "kept": ("place",),
    "used_for": ("phrase", "word"), "maker": ("name",), "age": ("number", "date"), "size": ("number",),
    "material": ("word", "phrase"), "due": ("date", "time"), "food_of": ("word", "phrase"),
    "contact": ("name", "number"),
    "how_many_have": ("number",), "opinion": ("phrase", "word"), "lives": ("place", "origin"),
    "instructions": ("phrase",), "brand": ("word", "name"), "reason": ("phrase",), "for_whom": ("name",),
    "fact": VALUE_KINDS,
}  # fmt: skip
"""Kind of question -> kinds of its values."""
CAPTION = "caption"
"""The kind of a fact about a picture that is told without a question."""
TEXT_SHARE, CAPTION_SHARE, OTHER_VALUE_SHARE = 0.25, 0.15, 0.3
PICTURE_SHARE, QUESTION_SHARE = 0.35, 0.45
"""Shares of the strangers that ask a known question about a picture never told of, and another question about a known
picture: without many of these, keys tell pictures apart and questions hardly."""
ONE_QUESTION_SHARE = 0.35
"""Share of the memories whose facts all answer one kind of question: only the picture tells them apart."""


SEEN_KINDS = (*PICTURE_KINDS, "not_understood")
"""Kinds of questions that no fact answers: about what a picture shows, and others."""
SEEN_SHARE = 0.4
"""Share of these among other questions about a known picture."""
NAMED_SHARE = 0.3
"""How often a question about a thing may use its name ("whose is this cup")."""
SIDES = ("left", "right", "above", "below")


class Query(NamedTuple):
    """A question, about a thing or none."""

    thing: int
    """Index of a thing whose views are pictures; -1 for a question in words alone."""
    kind: str
    """A kind of MEMORY_KINDS, `caption`, or `text`; of a stranger also one of SEEN_KINDS."""
    subject: str
    """Of a question in words alone, what it asks for; else empty."""


class Fact(NamedTuple):
    """A query and its answer."""

    query: Query
    value: str


class FactSampler:
    """Draws the facts of a memory and the strangers to it."""

    def __init__(self, names: Sequence[str | None], caption_prompt: str, split: Split = "train"):
        """`names` are those of the things that there are views of, None for a thing without one."""
        self.names, self.caption_prompt, self.split = list(names), caption_prompt, split
        self.things = len(self.names)
        self._known_names = sorted({name for name in self.names if name}) or ["thing"]
        self.subjects = fact_subjects(split)
        self._by_text = {subject.text: subject for subject in self.subjects}

    def facts(self, count: int, rng: np.random.Generator) -> list[Fact]:
        """`count` facts with different queries."""
        kind = None
        # One question needs a picture for each fact.
        if rng.random() < ONE_QUESTION_SHARE and 2 * count <= self.things:
            kinds = (*MEMORY_KINDS, CAPTION)
            kind = kinds[int(rng.integers(len(kinds)))]
        queries: dict[Query, None] = {}
        while len(queries) < count:
            queries[self._query(kind, queries, rng)] = None
        return [Fact(query, self._value(query, rng)) for query in queries]

    def strangers(self, facts: list[Fact], count: int, rng: np.random.Generator) -> list[Query]:
        """Queries that none of the facts answers, near to them."""
        known = {fact.query for fact in facts}
        pictured = [fact.query for fact in facts if fact.query.thing >= 0]
        seen = {query.thing for query in pictured}
        result: list[Query] = []
        while len(result) < count:
            choice = rng.random()
            if pictured and choice < PICTURE_SHARE:
                # A known question about a picture that was never told of.
                query = pictured[int(rng.integers(len(pictured)))]._replace(
                    thing=int(rng.integers(self.things))
                )
                if query.thing in seen:
                    continue
            elif pictured and choice < PICTURE_SHARE + QUESTION_SHARE:
                kinds = SEEN_KINDS if rng.random() < SEEN_SHARE else MEMORY_KINDS
                kind = kinds[int(rng.integers(len(kinds)))]
                query = pictured[int(rng.integers(len(pictured)))]._replace(kind=kind)
            elif choice < 0.9:
                query = Query(-1, "text", self.subjects[int(rng.integers(len(self.subjects)))].text)
            else:
                query = self._query(None, {}, rng)
                if query.thing in seen:
                    continue
            # "fact" asks for anything that was said about a picture: it is no stranger to another fact of it.
            others = {fact.query.kind for fact in facts if fact.query.thing == query.thing >= 0}
            if query in known or ("fact" in others | {query.kind} and others):
                continue
            # What was told without a question may be what the picture shows.
            if query.kind in SEEN_KINDS and CAPTION in others:
                continue
            result.append(query)
        return result

    def ask(self, query: Query, rng: np.random.Generator) -> str:
        """A question with the query's meaning, in a random wording."""
        if query.kind == CAPTION:
            return self.caption_prompt
        if query.kind == "text":
            return question("fact_text", rng, self.split, x=query.subject)
        if query.kind in SEEN_KINDS:
            return self.seen_question(query.kind, rng)
        name = self.names[query.thing] if query.thing >= 0 else self._name(rng)
        named = {"x": name} if name and rng.random() < NAMED_SHARE else {}
        return question(query.kind, rng, self.split, **named)

    def seen_question(self, kind: str, rng: np.random.Generator) -> str:
        """A question of SEEN_KINDS about random things, colours and sides."""
        sides = SIDES if kind in ("what_beside", "is_at") else ("left", "right", "top", "bottom", "middle")
        return question(
            kind,
            rng,
            self.split,
            x=self._name(rng),
            y=self._name(rng),
            colour=COLOURS[int(rng.integers(len(COLOURS)))],
            side=sides[int(rng.integers(len(sides)))],
        )

    def _name(self, rng: np.random.Generator) -> str:
        return self._known_names[int(rng.integers(len(self._known_names)))]

    def _query(self, kind: str | None, others: dict[Query, None], rng: np.random.Generator) -> Query:
        choice = rng.random()
        if kind is None and choice < TEXT_SHARE:
            return Query(-1, "text", self.subjects[int(rng.integers(len(self.subjects)))].text)
        if kind is None and choice < TEXT_SHARE + CAPTION_SHARE:
            return Query(int(rng.integers(self.things)), CAPTION, "")
        thing = int(rng.integers(self.things))
        pictured = [query.thing for query in others if query.thing >= 0]
        if kind is None and pictured and rng.random() < 0.2:
            thing = pictured[int(rng.integers(len(pictured)))]
        return Query(thing, kind or MEMORY_KINDS[int(rng.integers(len(MEMORY_KINDS)))], "")

    def _value(self, query: Query, rng: np.random.Generator) -> str:
        if query.kind == "text":
            usual: tuple[str, ...] = (self._by_text[query.subject].value,)
        else:
            usual = VALUE_OF.get(query.kind, VALUE_KINDS)
        kinds = VALUE_KINDS if rng.random() < OTHER_VALUE_SHARE else usual
        return fact_value(kinds[int(rng.integers(len(kinds)))], rng, self.split)
