"""The language of `photo`: forms and values in disjoint halves, correct English, the same texts for the same seed."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from microvlm.bench.memory.fact_sets import QUESTIONS
from microvlm.bench.memory.open_values.open_value_scores import MORE_QUESTIONS
from microvlm.bench.memory.open_values.pointing_fit import IMAGE_QUESTIONS
from microvlm.training.photo.batches.open_facts import VALUE_OF
from microvlm.training.photo.language import answers, english
from microvlm.training.photo.language.build_forms import (
    EVALUATED,
    FORMS,
    MODEL_LINES,
    build,
    document_text,
)
from microvlm.training.photo.language.fact_subjects import all_subjects, fact_subjects
from microvlm.training.photo.language.fact_values import (
    MAX_CHARACTERS,
    VALUE_KINDS,
    fact_value,
    value_words,
)
from microvlm.training.photo.language.grammar_notation import expand, read_grammar
from microvlm.training.photo.language.paraphrase_checks import (
    EXAMPLE_NAMES,
    keeps_meaning,
    main_words,
    to_form,
)
from microvlm.training.photo.language.question_forms import (
    KINDS,
    MEMORY_KINDS,
    PICTURE_KINDS,
    SPLITS,
    families,
    fill,
    forms,
    placeholders,
    question,
    read_families,
)
from microvlm.training.photo.language.thing_kinds import is_kind, kinds_of, thing_kinds
from microvlm.training.photo.language.wrappings import SIDES_AT, SIDES_OF

NAMES = {"x": "owl", "y": "scissors", "colour": "orange", "side": "left"}
NEEDED = {
    "describe": set(),
    "what": set(),
    "what_kind": {"x"},
    "what_at": {"side"},
    "what_beside": {"side", "x"},
    "between": {"x", "y"},
    "where": {"x"},
    "how_many": set(),
    "how_many_of": {"x"},
    "colour_of": {"x"},
    "colour": set(),
    "ground": set(),
    "is_there": {"x"},
    "is_colour": {"x", "colour"},
    "is_at": {"x", "y", "side"},
    "is_it": {"x"},
    "fact_text": {"x"},
}


def normal(template: str) -> str:
    """A template without marks, contractions and American spelling."""
    for short in ("what", "where", "who"):
        template = template.replace(f"{short}'s ", f"{short} is ")
    template = re.sub(r"(?<!\{)color", "colour", template).replace("recognize", "recognise")
    return " ".join(re.sub(r"[^a-z{}' ]", " ", template).split())


def test_the_committed_file_is_what_the_builder_makes_of_the_committed_lines():
    written = json.loads(MODEL_LINES.read_text(encoding="utf-8"))["forms"]
    assert FORMS.read_text(encoding="utf-8") == document_text(build(written))


@pytest.mark.parametrize("kind", KINDS)
def test_no_wording_of_one_half_is_in_the_other_whatever_its_marks_and_spelling(kind):
    train, held_out = ({normal(text) for text in forms(kind, split)} for split in SPLITS)
    assert train & held_out == set()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fact_text"])
def test_no_held_out_form_has_the_main_words_of_a_trained_one(kind):
    document = json.loads(FORMS.read_text(encoding="utf-8"))
    words: dict[str, set] = {split: set() for split in SPLITS}
    for row in document["kinds"][kind]:
        words[row["split"]] |= {main_words(form) for form in row["forms"]}
    assert words["train"] & words["held_out"] == set()


def test_other_wordings_that_the_memory_bench_asks_in_are_in_no_trained_family():
    asked = {paraphrase.rstrip("?") for _, paraphrase in (*QUESTIONS, *MORE_QUESTIONS)}
    assert asked == set(EVALUATED)
    asked |= {paraphrase.rstrip("?") for _, paraphrase in IMAGE_QUESTIONS}
    trained = {text for kind in KINDS for text in forms(kind, "train")}
    known = {form for kind in MEMORY_KINDS for form in forms(kind, "held_out")}
    assert asked & trained == set()
    assert asked <= known


def test_every_kind_has_its_number_of_wordings_in_both_halves():
    counts = {kind: [len(forms(kind, split)) for split in SPLITS] for kind in KINDS}
    assert tuple(read_families()) == KINDS or set(read_families()) == set(KINDS)
    assert all(min(counts[kind]) >= 300 for kind in PICTURE_KINDS), counts
    assert all(min(counts[kind]) >= 100 for kind in MEMORY_KINDS), counts
    assert min(counts["not_understood"]) >= 1000
    plain = {
        split: {form[0] for family in families("not_understood", split) for form in family.forms}
        for split in SPLITS
    }
    assert min(map(len, plain.values())) >= 500


@pytest.mark.parametrize("kind", KINDS)
def test_templates_have_the_placeholders_of_their_kind(kind):
    for split in SPLITS:
        for template in forms(kind, split):
            if kind in NEEDED:
                assert placeholders(template) == NEEDED[kind], template
            else:
                assert placeholders(template) <= {"x"}, template
            assert template.isascii()
            assert template == template.lower() == " ".join(template.split())
            assert not re.search(r"[()/@;]|\.$", template), template


def test_held_out_wordings_of_pictures_use_words_that_training_knows():
    def words(split):
        templates = (
            text for kind in (*PICTURE_KINDS, *MEMORY_KINDS, "fact_text") for text in forms(kind, split)
        )
        return {word for text in templates for word in re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text))}

    # "ok" and "well" stand before a question and mean nothing.
    assert words("held_out") - words("train") <= {"ok", "well"}


def test_places_are_said_in_words_that_training_knows_and_only_half_of_them_the_same_way():
    for sides in (SIDES_AT, SIDES_OF):
        trained = {word for phrases in sides["train"].values() for text in phrases for word in text.split()}
        for side, phrases in sides["held_out"].items():
            assert set(phrases) - set(sides["train"][side])
        # "than" of "higher than" and the like are in `train` of SIDES_OF, all others in either table.
        known = (
            trained
            | {word for text in forms("what_at", "train") for word in text.split()}
            | {"higher", "lower"}
        )
        assert {
            w for phrases in sides["held_out"].values() for text in phrases for w in text.split()
        } <= known


def test_a_string_belongs_to_one_kind_but_for_facts_and_what_no_picture_answers():
    owners: dict[str, set[str]] = {}
    for kind in KINDS:
        if kind != "fact_text":
            for split in SPLITS:
                for template in forms(kind, split):
                    owners.setdefault(normal(template), set()).add(kind)
    # What a picture cannot answer, a memory may.
    shared = {text: kinds - {"not_understood"} for text, kinds in owners.items()}
    assert {text: kinds for text, kinds in shared.items() if len(kinds) > 1} == {}
    assert not any("not_understood" in kinds and kinds & {*PICTURE_KINDS} for kinds in owners.values())


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_the_same_for_the_same_seed_and_have_no_placeholder_left(kind):
    names = {} if kind == "fact_text" else NAMES
    texts = [
        [question(kind, np.random.default_rng([7, n]), "train", **names) for n in range(40)] for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 8
    assert not any("{" in text or text != text.lower() for text in texts[0])


def test_questions_without_a_name_ask_without_one():
    rng = np.random.default_rng(1)
    for kind in MEMORY_KINDS:
        assert not any("{" in question(kind, rng, split) for split in SPLITS for _ in range(20))


def test_a_question_without_the_names_that_it_needs_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="between needs more names than x"):
        question("between", rng, x="cat")
    with pytest.raises(ValueError, match="kind must be one of"):
        question("who knows", rng)
    with pytest.raises(ValueError, match="split must be one of"):
        forms("what", "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="side must be one of left, right, above, below"):
        question("what_beside", rng, x="cat", side="middle")


@pytest.mark.parametrize(
    ("template", "names", "text"),
    [
        ("is there a {x}?", {"x": "owl"}, "is there an owl?"),
        ("is there a {x}?", {"x": "unicorn"}, "is there a unicorn?"),
        ("is there a {x}?", {"x": "sunglasses"}, "is there a pair of sunglasses?"),
        ("is it a {colour} {x}?", {"x": "cat", "colour": "orange"}, "is it an orange cat?"),
        ("how many {x}s are there?", {"x": "wine glass"}, "how many wine glasses are there?"),
        ("what is the {x}'s colour", {"x": "bus"}, "what is the bus's colour"),
        ("where is the {x}?", {"x": "scissors"}, "where are the scissors?"),
        (
            "the {x} is {side} the {y}",
            {"x": "cat", "y": "Owl", "side": "left of"},
            "the cat is left of the owl",
        ),
    ],
)
def test_templates_are_filled_in_correct_english(template, names, text):
    assert fill(template, names) == text


@pytest.mark.parametrize(
    ("noun", "text"),
    [
        ("apple", "an apple"),
        ("hourglass", "an hourglass"),
        ("uniform", "a uniform"),
        ("ukulele", "a ukulele"),
        ("unopened letter", "an unopened letter"),
        ("umbrella", "an umbrella"),
        ("usb stick", "a usb stick"),
        ("x-ray", "an x-ray"),
        ("one-armed bandit", "a one-armed bandit"),
        ("european hornet", "a european hornet"),
        ("ear", "an ear"),
        ("ice cream", "some ice cream"),
    ],
)
def test_a_and_an(noun, text):
    assert english.with_article(noun) == text


@pytest.mark.parametrize(
    ("noun", "text"),
    [
        ("cat", "cats"),
        ("box", "boxes"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("wolf", "wolves"),
        ("child", "children"),
        ("fireman", "firemen"),
        ("human", "humans"),
        ("sheep", "sheep"),
        ("stomach", "stomachs"),
        ("slice of pizza", "slices of pizza"),
        ("jack-in-the-box", "jacks-in-the-box"),
        ("tennis ball", "tennis balls"),
        ("sunglasses", "sunglasses"),
        ("broccoli", "broccoli"),
        ("piano", "pianos"),
        ("tomato", "tomatoes"),
    ],
)
def test_plurals(noun, text):
    assert english.plural(noun) == text


def test_answers_are_canonical_texts():
    assert answers.describe_scene(["owl"]) == "an owl"
    assert answers.describe_scene(["cat", "owl"], "left") == "a cat left of an owl"
    assert (
        answers.describe_scene(["cat", "owl", "cat"], ground="orange")
        == "two cats and an owl on an orange ground"
    )
    assert (
        answers.describe_scene(["cat", "owl", "bus"], "above") == "a cat, an owl and a bus from top to bottom"
    )
    assert answers.relation("cat", "below", "owl") == "a cat is below an owl"
    assert answers.how_many(6) == "six"
    assert answers.how_many(0, "dog") == answers.NOT_SEEN == "i don't see one"
    assert answers.absent("owl") == "i don't see an owl"
    assert answers.two_names("cat", "owl") == "a cat or an owl"
    assert [answers.yes_or_no(truth) for truth in (True, False)] == ["yes", "no"]
    assert answers.place("middle") == "in the middle"
    with pytest.raises(ValueError, match="side must be one of left, right, above, below"):
        answers.relation("cat", "beside", "owl")
    with pytest.raises(ValueError, match="count must be 0 to 10"):
        answers.count_word(11)


def test_subjects_of_facts_without_a_picture_are_many_and_in_disjoint_halves():
    train, held_out = ({s.text for s in fact_subjects(split)} for split in SPLITS)
    assert len(all_subjects()) >= 300
    assert train & held_out == set()
    assert len(train) + len(held_out) == len(all_subjects())
    assert min(len(train), len(held_out)) >= 150
    assert {s.value for s in all_subjects()} <= set(VALUE_KINDS)
    words = Counter(family.name.split(" ")[0] for split in SPLITS for family in families("fact_text", split))
    assert set(words) == {s.word for s in all_subjects()}


def test_a_subject_is_asked_for_by_its_own_word():
    rng = np.random.default_rng(3)
    for split in SPLITS:
        texts = [question("fact_text", rng, split, x="the hammer") for _ in range(200)]
        assert not any(re.search(r"\b(when|who)\b", text) for text in texts)
        assert any("where" in text for text in texts)


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_values_are_many_short_and_in_disjoint_halves(kind):
    values = {
        split: [fact_value(kind, np.random.default_rng([5, n]), split) for n in range(2000)]
        for split in SPLITS
    }
    assert set(values["train"]) & set(values["held_out"]) == set()
    assert all(len(set(texts)) > 600 for texts in values.values())
    assert all(
        0 < len(text) <= MAX_CHARACTERS and text.isascii() for texts in values.values() for text in texts
    )
    assert values["train"] == [fact_value(kind, np.random.default_rng([5, n]), "train") for n in range(2000)]


def test_every_kind_of_memory_has_a_kind_of_value():
    assert set(VALUE_OF) == set(MEMORY_KINDS)
    assert {value for kinds in VALUE_OF.values() for value in kinds} <= set(VALUE_KINDS)
    assert len(value_words()["noun"]) > 1500
    with pytest.raises(ValueError, match="kind must be one of"):
        fact_value("colour", np.random.default_rng(0))


def test_the_notation_expands_choices_options_and_nested_choices():
    assert expand("what (is/was) (this/the (old/) box)") == [
        "what is this",
        "what is the old box",
        "what is the box",
        "what was this",
        "what was the old box",
        "what was the box",
    ]
    assert read_grammar("be: q what is it; m name it") == {"be": ["q what is it", "m name it"]}
    with pytest.raises(ValueError, match="does not start with"):
        read_grammar("be: what is it")
    with pytest.raises(ValueError, match="occurs twice"):
        read_grammar("be: q a b\nbe: q c d")


@pytest.mark.parametrize(
    ("kind", "line", "form"),
    [
        ("where", "Where can I see the teapot?", "q where can i see the {x}"),
        ("where", "What color is the teapot?", None),
        ("where", "Where is the lid of the teapot?", None),
        ("where", "Where is it?", None),
        ("what_beside", "What's on the left side of the teapot?", "q what is {side} the {x}"),
        ("what_beside", "What is to the right of the teapot?", None),
        ("is_colour", "Is the teapot green or blue?", None),
        ("how_many_of", "Tell me how many teapots there are.", "i how many {x}s there are"),
        ("between", "What is between the teapot and the lamp?", "q what is between the {x} and the {y}"),
        ("between", "What is between the lamp?", None),
    ],
)
def test_a_line_of_the_model_is_taken_only_if_it_keeps_its_kind(kind, line, form):
    assert to_form(kind, line) == form


def test_lines_of_the_model_that_were_taken_keep_the_rules_today():
    document = json.loads(MODEL_LINES.read_text(encoding="utf-8"))
    assert set(document["forms"]) <= set(EXAMPLE_NAMES)
    for kind, written in document["forms"].items():
        assert set(written) & set(document["rejected"].get(kind, [])) == set()
        assert len(written) == len(set(written))
        if kind != "not_understood":
            assert [form for form in written if not keeps_meaning(kind, form)] == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("beagle", {"dog", "animal"}),
        ("monarch", {"butterfly", "insect", "animal"}),
        ("electric guitar", {"guitar", "musical instrument"}),
        ("banana", {"fruit", "food"}),
        ("dog", {"dog", "animal"}),
        ("abacus", set()),
        ("crane", set()),
        ("a name of no list", set()),
    ],
)
def test_a_thing_is_of_its_kind_and_of_all_above_it(name, kinds):
    assert kinds_of(name) == kinds


def test_what_is_of_no_kind_is_told_from_what_is_open():
    assert is_kind("beagle", "cat") is False
    assert is_kind("abacus", "dog") is False
    # A lion is a big cat; the bird and the machine share a name; nothing is known of the third.
    assert [
        is_kind(*pair) for pair in (("lion", "cat"), ("crane", "bird"), ("a name of no list", "dog"))
    ] == [None] * 3
    with pytest.raises(KeyError):
        is_kind("beagle", "beagle")
    names = set(thing_kinds())
    assert all(is_kind(kind, kind) for kind in names)
