"""Pictures that are to be declined: drawn ones, and records that say so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from microvlm.configuration.answers import ABSENT, NOT_UNDERSTOOD, UNKNOWN
from microvlm.errors import UserError
from microvlm.training.data.caption_data import open_data
from microvlm.training.data.data_command import command
from microvlm.training.data.images.conversation import Columns, find_turns
from microvlm.training.data.images.source_record import BadRecord
from microvlm.training.data.strangers.patterns import KINDS, draw
from microvlm.training.data.strangers.strangers_command import KIND_NAMES, write_strangers


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_pattern_is_a_function_of_its_seed_and_has_more_than_one_colour(kind):
    pictures = [draw(kind, np.random.default_rng(seed), 48) for seed in (1, 1, 2)]
    assert all((picture.dtype, picture.shape) == (np.uint8, (48, 48, 3)) for picture in pictures)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert pictures[0].std() > 1


def test_the_command_knows_the_kinds_that_can_be_drawn():
    assert tuple(KINDS) == KIND_NAMES


def test_strangers_become_a_data_folder_whose_turns_decline_by_kind(tmp_path):
    source, out = tmp_path / "strangers", tmp_path / "data"
    result = CliRunner().invoke(
        command, ["strangers", "-o", str(source), "--count", "7", "--side", "32", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["written"] == {
        **dict.fromkeys(KIND_NAMES, 1),
        **{"noise": 2, "stripes": 2},
    }
    assert len(list(source.glob("*.png"))) == 7
    again = tmp_path / "again"
    write_strangers(again, 3, 0, 32)
    for path in again.glob("*.png"):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(source / path.name)))
    with pytest.raises(UserError, match="is not empty; give a new folder with -o"):
        write_strangers(again, 3, 0, 32)
    flags = ["--validation", "0", "--test", "0", "--workers", "0"]
    built = CliRunner().invoke(command, ["images", str(source / "captions.jsonl"), "-o", str(out), *flags])
    assert built.exit_code == 0, built.output
    turns = list(open_data(out).turns("train"))
    assert sorted(turn.declines for (turn,) in turns) == sorted([*KIND_NAMES, "noise", "stripes"])
    assert {turn.answer for (turn,) in turns} == {UNKNOWN}


def turns_of(**row):
    return find_turns(row, Columns(), 1, 100)[0]


def test_a_turn_that_declines_says_what_its_kind_is_told_or_its_own_answer():
    assert [(turn.declines, turn.answer) for turn in turns_of(declines="clutter")] == [("clutter", UNKNOWN)]
    (absent,) = turns_of(question="where is the dog?", declines="absent")
    assert (absent.question, absent.answer) == ("where is the dog?", ABSENT)
    given = [
        {"answer": "a cat"},
        {"question": "fnord?", "declines": "question"},
        {"question": "where is it?", "declines": "absent", "answer": "nowhere"},
    ]
    cat, fnord, nowhere = turns_of(turns=given)
    assert (cat.declines, fnord.answer) == (turns_of(caption="a cat")[0].declines, NOT_UNDERSTOOD)
    assert (nowhere.answer, nowhere.declines) == ("nowhere", "absent")


def test_a_caption_of_a_table_with_an_empty_cell_declines_nothing():
    (turn,) = turns_of(caption="a cat", declines="")
    assert (turn.answer, turn) == ("a cat", turns_of(caption="a cat")[0])


@pytest.mark.parametrize(
    "row",
    [{"declines": "NOISE!"}, {"declines": 3}, {"turns": [{"question": "what?"}]}, {"declines": "x" * 41}],
)
def test_a_turn_without_answer_and_a_kind_that_is_no_word_are_left_out(row):
    with pytest.raises(BadRecord):
        turns_of(**row)
