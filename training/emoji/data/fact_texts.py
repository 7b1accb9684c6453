"""Samples facts to train the memory on: questions about an object, in several wordings, and their answers.

Deterministic given the random generator; knows no pixels and no torch. No list contains the sentences that
`microvlm-bench memory` asks as paraphrases; their words occur in other sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NAMES = """
adam agnes alan albert alex alice amy andrea anna anton arthur astrid barbara bella ben bernard betty boris bruno
carl carla carmen cecilia charles chloe chris clara claudia colin cora daisy daniel david dennis diana dora dylan
edith eduardo elena elias elliot elsa emil emily emma eric erika ethan eva felix fiona florence frank frida gabriel
george gina gloria grace greta gustav hanna harold harry hazel helen henry hugo ian igor ingrid irene iris isaac
isabel ivan ivy jack jacob james jane jasmine jason jean jenny jerome jim joan joel johanna jonas joseph judith
julia kai karen kate keith kevin klaus lara laura lea leo leon lily linda lisa louis lucas lucy luna mabel malcolm
marco maria marie mark marta martin mary mathilda max megan mia michael mike mira molly monica nadia nancy natalie
nathan neil nicole nils nina noah nora norman olga oliver olive olivia omar oscar otto pablo pam patrick paul paula
pedro peggy penny peter petra philip phoebe pia quentin quinn rachel ralph ray rebecca rene rita robert robin roger
roland rosa rose roy ruby rudolf ruth ryan sabrina sally sam samuel sandra sara sean selma simon sofia sonia stella
steve sue susan sven sylvia tamara tanya ted teresa theo thomas tim tina tobias tom tony tracy ulrich ursula
valentin vanessa vera veronica victor vincent viola violet walter wanda wendy wilma willy xavier xenia yara
yusuf yvonne zachary zelda zoe zora
"""
NAMES = tuple(_NAMES.split())
_PLACES = """
kitchen garage attic cellar garden office school library bedroom bathroom hall balcony shed car van boat drawer
wardrobe shelf box basket suitcase backpack desk fridge oven museum shop station church barn stable workshop studio
gym theatre hospital hotel cabin tent
"""
PLACES = tuple(_PLACES.split())
_DAYS = """
monday tuesday wednesday thursday friday saturday sunday january february march april may june july august
september october november december yesterday today christmas easter spring summer autumn winter
"""
DAYS = tuple(_DAYS.split())


@dataclass(frozen=True)
class Relation:
    """A property of objects, with the wordings of its question; `{noun}` stands for the object's caption."""

    image_questions: tuple[str, ...]
    """Questions that go with a picture of the object; the first is the most frequent."""
    text_questions: tuple[str, ...]
    """Questions without a picture."""
    values: tuple[str, ...]
    """Possible answers."""


RELATIONS = (
    Relation(
        (
            "whose is this?",
            "who does this belong to?",
            "who is the owner of this?",
            "who owns it?",
            "whose {noun} is this?",
            "who owns this {noun}?",
        ),
        ("whose is the {noun}?", "who owns the {noun}?", "who does the {noun} belong to?"),
        NAMES,
    ),
    Relation(
        (
            "who gave me this?",
            "who gave this to me?",
            "from whom is this?",
            "who is it from?",
            "who gave me this {noun}?",
            "who is this {noun} from?",
        ),
        ("who gave me the {noun}?", "from whom is the {noun}?", "who is the {noun} from?"),
        NAMES,
    ),
    Relation(
        (
            "where do i keep this?",
            "where did i put this?",
            "where is this kept?",
            "where do i keep it?",
            "where do i keep this {noun}?",
        ),
        ("where do i keep the {noun}?", "where did i put the {noun}?", "where is the {noun} kept?"),
        PLACES,
    ),
    Relation(
        (
            "when did i get this?",
            "since when do i have this?",
            "when did i get it?",
            "when did i get this {noun}?",
        ),
        ("when did i get the {noun}?", "since when do i have the {noun}?"),
        DAYS,
    ),
    Relation(
        ("what is its name?", "what do i call this?", "what did i name this?", "what do i call this {noun}?"),
        ("what do i call the {noun}?", "what is the name of the {noun}?", "what did i name the {noun}?"),
        (*NAMES, *PLACES),
    ),
)
RELATION_SHARES = (0.3, 0.3, 0.16, 0.08, 0.16)
FIRST_WORDING_SHARE = 0.4
UNKNOWN = "unknown"
"""The answer to a question that the memory cannot answer."""


@dataclass(frozen=True)
class Fact:
    """A value that is written under one question and read by another wording of it."""

    object: int
    """Row of the object; facts of one object differ in their relation."""
    relation: int
    """Index into RELATIONS."""
    write_question: str
    read_question: str
    value: str


def sample_facts(
    rng: np.random.Generator,
    objects: Sequence[int],
    captions: Sequence[str],
    pictured: bool,
    paired: float = 0.25,
) -> list[Fact]:
    """One fact for each of `objects`; with probability `paired` it is about the object before, by another relation.

    captions : the captions of the first objects; the others have none, and no question names them. pictured : whether
    the questions go with a picture.
    """
    facts: list[Fact] = []
    for candidate in objects:
        row, relation = int(candidate), int(rng.choice(len(RELATIONS), p=RELATION_SHARES))
        last = facts[-1] if facts else None
        unpaired = len(facts) < 2 or facts[-2].object != facts[-1].object
        if last and unpaired and last.relation != relation and rng.random() < paired:
            row = last.object
        details = RELATIONS[relation]
        wordings = details.image_questions if pictured else details.text_questions
        has_caption = row < len(captions)
        if not has_caption:
            wordings = tuple(wording for wording in wordings if "{noun}" not in wording)
        write_question, read_question = (_wording(rng, wordings) for _ in range(2))
        if has_caption:
            write_question = write_question.format(noun=captions[row])
            read_question = read_question.format(noun=captions[row])
        facts.append(Fact(row, relation, write_question, read_question, str(rng.choice(details.values))))
    return facts


def _wording(rng: np.random.Generator, wordings: Sequence[str]) -> str:
    """A random wording, the first one with a higher probability."""
    return wordings[0 if rng.random() < FIRST_WORDING_SHARE else int(rng.integers(len(wordings)))]
