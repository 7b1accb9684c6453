"""Time to a score: a run that stops when an evaluation reaches it, and the leaderboard that it is added to."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import msgspec
import pytest
from captioned_pictures import write_data
from click.testing import CliRunner

from microvlm.bench.training.leaderboard_records import Entry
from microvlm.errors import UserError
from microvlm.memory.file_lock import locked
from microvlm.training.time_to_score.leaderboard import add_to_leaderboard, read_leaderboard
from microvlm.training.time_to_score.run_outcome import run_outcome
from microvlm.training.time_to_score.score_target import ScoreTarget, parse_target
from microvlm.training.train_command import whole_command

RECIPE = {
    "name": "tiny",
    "preset": "nano",
    "seed": 3,
    "mixed_precision": "no",
    "log_every": 4,
    "save_every": 50,
    "picture_every": 1000,
    "stages": [
        {
            "name": "first",
            "task": "captions",
            "steps": 2,
            "batch_size": 4,
            "caption": {"trained": {"all": 1.0}},
        },
        {
            "name": "last",
            "task": "captions",
            "steps": 30,
            "batch_size": 4,
            "learning_rate": 0.003,
            "decoder_bits": 1.58,
            "caption": {"trained": {"all": 1.0, "vision": 0.0}},
        },
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(RECIPE))
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(whole_command(), list(map(str, arguments)), standalone_mode=False)


@pytest.fixture(scope="module")
def reached(data, recipe, tmp_path_factory):
    """A run whose last stage is far from its end when the loss is below its target: folder, leaderboard, result."""
    folder = tmp_path_factory.mktemp("reached")
    board = folder / "board.jsonl"
    result = invoke(
        recipe, "--data", data, "-o", folder / "run", "--until", "loss=7.0", "--score-every", 3,
        "--leaderboard", board, "--price-per-hour", 1.5,
    )  # fmt: skip
    assert result.exception is None, result.exception
    return folder / "run", board, result


def evaluations(run: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


@pytest.mark.training
def test_a_run_stops_at_the_first_evaluation_of_its_last_stage_that_reaches_the_score(reached):
    run, _, result = reached
    rows = evaluations(run, "last")
    assert 0 < rows[-1]["stage_step"] < 30
    assert rows[-1]["evaluation/loss"] <= 7.0
    assert all(row["evaluation/loss"] > 7.0 for row in rows[1:-1])
    assert (run / "checkpoint" / "model.safetensors").is_file()
    assert result.return_value == 0
    assert "reached loss <= 7 (with" in result.output


@pytest.mark.training
def test_the_leaderboard_has_the_runs_provenance_and_what_it_spent(reached):
    run, board, _ = reached
    (entry,) = read_leaderboard(board)
    steps = 2 + evaluations(run, "last")[-1]["stage_step"]
    assert (entry.steps, entry.samples, entry.seed, entry.decoder_bits) == (steps, 4 * steps, 3, 1.58)
    assert entry.data[0].sha256
    assert len(entry.recipe_sha256) == len(entry.code_sha256) == 64
    assert entry.tokens > 0
    assert entry.peak_memory_bytes > 1e7
    assert entry.training_seconds > 0
    both = evaluations(run, "first") + evaluations(run, "last")
    assert entry.evaluation_seconds == pytest.approx(sum(row["seconds"] for row in both), abs=0.01)
    hours = (entry.training_seconds + entry.evaluation_seconds) / 3600
    assert entry.cost == pytest.approx(1.5 * hours, abs=1e-6)
    # Evaluations are no part of the steps' time.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "train/step_s" in row]
    assert [row["step"] for row in logged][-1] == steps


@pytest.mark.training
def test_the_same_command_again_adds_nothing_and_keeps_the_entry(reached, data, recipe):
    run, board, _ = reached
    before = board.read_bytes()
    result = invoke(
        recipe, "--data", data, "-o", run, "--until", "loss=7.0", "--score-every", 3, "--leaderboard", board
    )
    assert result.exception is None, result.exception
    assert board.read_bytes() == before
    assert "has this run already" in result.output
    assert not list(board.parent.glob(".*lock"))


@pytest.mark.training
def test_a_run_that_never_reaches_the_score_is_whole_has_status_1_and_is_not_added(
    reached, data, recipe, tmp_path
):
    board = tmp_path / "board.jsonl"
    result = invoke(
        recipe, "--data", data, "-o", tmp_path / "run", "--until", "token_accuracy=2", "--budget", 4,
        "--leaderboard", board, "--json",
    )  # fmt: skip
    assert result.return_value == 1, result.exception
    document = json.loads(result.stdout)
    assert document["complete"]
    assert document["outcome"]["score"]["reached"] is False
    assert document["outcome"]["budget"] == "4 steps"
    assert not board.exists()


@pytest.mark.training
def test_a_run_that_was_stopped_between_reaching_and_finishing_is_done_when_it_is_resumed(
    reached, data, recipe, tmp_path
):
    run, _, _ = reached
    last = evaluations(run, "last")[-1]["stage_step"]
    (run / "last" / "done").unlink()
    result = invoke(recipe, "--data", data, "-o", run, "--until", "loss=7.0", "--score-every", 3)
    assert result.exception is None, result.exception
    assert evaluations(run, "last")[-1]["stage_step"] == last


@pytest.mark.training
def test_a_score_that_the_run_does_not_measure_is_refused_before_it_trains(data, recipe, tmp_path):
    result = invoke(recipe, "--data", data, "-o", tmp_path / "run", "--until", "text_perplexity=20")
    assert isinstance(result.exception, UserError)
    assert "text_perplexity: this run does not measure it" in str(result.exception)
    assert "--text FILE" in str(result.exception)


@pytest.mark.training
def test_the_table_sorts_runs_to_one_score_by_their_time(reached, tmp_path):
    (entry,) = read_leaderboard(reached[1])
    board = tmp_path / "board.jsonl"
    for number, seconds in enumerate((90.0, 5.0, 4000.0)):
        other = msgspec.structs.replace(
            entry, run_id=f"{number:064x}", training_seconds=seconds, recipe=f"r{number}"
        )
        assert add_to_leaderboard(board, other)
    result = invoke("leaderboard", board)
    assert result.exception is None, result.exception
    lines = [line for line in result.output.splitlines() if line.startswith("loss <= 7")]
    assert [next(word for word in line.split() if word[0] == "r") for line in lines] == ["r1", "r0", "r2"]
    assert [word for line in lines for word in ("5.0s", "1m30s", "1h06m") if word in line] == [
        "5.0s",
        "1m30s",
        "1h06m",
    ]
    document = json.loads(invoke("leaderboard", board, "--json").stdout)
    assert len(document["entries"]) == 3


@pytest.mark.training
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda line: line[: len(line) // 2], "is not valid JSON"),
        (lambda line: b"[]\n", "line 1"),
        (lambda line: line + b"\xff\xfe\n", "line 2"),
        (lambda line: line.replace(b'"schema":1', b'"schema":2'), "has schema 2"),
        (lambda line: line.replace(b'"steps":', b'"steps":-'), "'steps'"),
        (lambda line: b"[" * 100_000, "line 1"),
    ],
    ids=["torn", "no object", "no text", "newer", "negative", "nested"],
)
def test_a_damaged_leaderboard_is_one_sentence_and_stays_as_it_is(reached, tmp_path, damage, words):
    good = reached[1].read_bytes()
    board = tmp_path / "board.jsonl"
    board.write_bytes(damage(good))
    before = board.read_bytes()
    entry = msgspec.json.decode(good, type=Entry)
    with pytest.raises(UserError, match=words):
        read_leaderboard(board)
    with pytest.raises(UserError, match=words):
        add_to_leaderboard(board, entry)
    assert board.read_bytes() == before
    assert list(tmp_path.iterdir()) == [board]


@pytest.mark.training
def test_a_name_with_control_characters_cannot_reach_the_terminal(reached, tmp_path):
    (entry,) = read_leaderboard(reached[1])
    board = tmp_path / "board.jsonl"
    add_to_leaderboard(board, msgspec.structs.replace(entry, recipe="\x1b[2Jgone"))
    assert "\x1b" not in invoke("leaderboard", board).output


@pytest.mark.posix
@pytest.mark.training
def test_runs_that_are_added_at_once_are_all_there(reached, tmp_path):
    (entry,) = read_leaderboard(reached[1])
    board = tmp_path / "board.jsonl"
    entries = [msgspec.structs.replace(entry, run_id=f"{number:064x}") for number in range(12)]
    threads = [threading.Thread(target=add_to_leaderboard, args=(board, each)) for each in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.run_id for each in read_leaderboard(board)} == {each.run_id for each in entries}


@pytest.mark.posix
def test_a_leaderboard_that_another_process_holds_is_said_to_be_that(tmp_path):
    board = tmp_path / "board.jsonl"
    with (
        locked(board),
        pytest.raises(UserError, match=r"board\.jsonl is being changed by process \d+; end it"),
        locked(board, wait_s=0.05, thing="the leaderboard"),
    ):
        pass


@pytest.mark.parametrize(
    "text", ["loss", "loss=", "loss=low", "loss=nan", "blame=3", "=3", "token_accuracy=inf"]
)
def test_a_score_that_is_no_name_and_number_is_refused(text):
    with pytest.raises(UserError, match="give NAME=VALUE with a name of loss"):
        parse_target(text)


def test_a_score_is_reached_from_its_better_side_and_never_by_nothing():
    loss, accuracy = ScoreTarget("loss", 2.0), parse_target("token_accuracy=0.5")
    assert loss.is_met({"evaluation/loss": 2.0})
    assert not loss.is_met({"evaluation/loss": 2.1})
    assert accuracy.is_met({"evaluation/token_accuracy": 0.6})
    for nothing in ({}, {"evaluation/loss": None}, {"evaluation/loss": float("nan")}):
        assert not loss.is_met(nothing)


def test_a_leaderboard_without_a_score_and_one_that_is_not_there_are_refused(tmp_path, recipe):
    result = invoke(recipe, "--data", tmp_path, "--leaderboard", tmp_path / "b.jsonl")
    assert "--leaderboard goes with --until" in str(result.exception)
    result = invoke(recipe, "--data", tmp_path, "--until", "loss=1", "--leaderboard", tmp_path / "no" / "b")
    assert "its folder does not exist" in str(result.exception)
    result = invoke("leaderboard", tmp_path / "b.jsonl")
    assert "b.jsonl does not exist" in str(result.exception)


@pytest.mark.training
def test_a_finished_run_answers_for_a_score_that_it_passed_on_its_way(reached):
    run, _, _ = reached
    rows = evaluations(run, "last")[1:]
    easy = ScoreTarget("loss", rows[0]["evaluation/loss"])
    entry = run_outcome(run, easy, None)
    assert entry.score.reached
    assert entry.steps == 2 + rows[0]["stage_step"]
    assert entry.cost is None
