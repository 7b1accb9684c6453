"""`microvlm memory`: every operation on a file, as sentences and as JSON, and refusals with status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.memory.memory_file import read_memory


@pytest.fixture
def memory(capsys, speaking_bundle):
    """Arguments -> (status, stdout, stderr). The model is the small bundle on ONNX Runtime unless they name one."""

    def call(command: str, *arguments: object) -> tuple[int, str, str]:
        model = [] if command == "list" or "--model" in arguments else ["--model", speaking_bundle]
        with pytest.raises(SystemExit) as exit_info:
            run_click(cli, ["memory", command, *map(str, (*arguments, *model))])
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return call


@pytest.fixture
def bike(tmp_path):
    path = tmp_path / "bike.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def test_a_fact_is_written_listed_read_overwritten_and_forgotten(memory, bike, tmp_path):
    trip = tmp_path / "trip.mem"
    about = ("--question", "whose is this?", "--image", bike)
    assert memory("write", "--text", "mine", *about, trip)[:2] == (0, "1. bike.png: whose is this? mine\n")
    assert "1 entry in a memory of 16 slots" in memory("list", trip)[1]
    memory("write", "--text", "a heart is red", trip)
    status, out, _ = memory("list", trip)
    assert status == 0
    assert "2 entries in a memory of 16 slots" in out
    assert "a heart is red" in out
    before = trip.read_bytes()
    status, out, _ = memory("read", *about, "--from", "decoder", "--max-new-tokens", 3, trip)
    assert (status, "(from the decoder, the reading" in out, trip.read_bytes() == before) == (0, True, True)
    status, out, _ = memory("read", *about, trip)
    assert (status, "confidence" in out, trip.read_bytes() == before) == (0, True, True)
    assert out.splitlines()[0] in ("mine", "not in this memory")
    status, out, _ = memory("overwrite", "--text", "yours", *about, trip)
    assert (status, "-> bike.png: whose is this? yours" in out) == (0, True)
    assert "forgotten: a heart is red" in memory("forget", "--entry", 2, trip)[1]
    assert "yours" in memory("forget", *about, trip)[1]
    assert "0 entries" in memory("list", trip)[1]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-8:strict"])
@pytest.mark.posix
def test_output_that_cannot_be_encoded_is_escaped_after_the_fact_was_written(
    encoding, speaking_bundle, tmp_path
):
    """A traceback and status 1 here once made scripts write a fact twice."""
    trip = tmp_path / "trip.mem"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", "from microvlm.commands.main import main; main()", "memory"]
    model = ["--model", str(speaking_bundle)]
    for arguments in (
        ["write", trip, "--question", "who?", "--text", "pizza \U0001f355", *model],
        ["overwrite", trip, "--question", "who?", "--text", "\U0001f355", *model, "--json"],
        ["list", trip],
        ["list", trip, "--json"],
    ):
        process = subprocess.run(
            [*command, *map(os.fsencode, arguments)], env=environment, capture_output=True
        )
        assert (process.returncode, process.stderr) == (0, b""), arguments
        if "--json" in arguments:
            assert json.loads(process.stdout)["entries"]
    assert len(read_memory(trip)[0].entries) == 1


def test_a_record_that_was_cut_off_is_said_once_and_the_next_change_repairs_the_file(memory, tmp_path):
    trip = tmp_path / "trip.mem"
    for number in range(3):
        memory("write", "--text", f"number {number}", trip)
    whole, first = trip.read_bytes(), trip.read_bytes().index(b"MVLM+ROW")
    trip.write_bytes(whole[:-9])
    sentence = f"{trip}: what was written last is lost, because its writer was cut off; 2 entries are whole\n"
    for arguments in (("list", trip), ("read", "--question", "what?", "--max-new-tokens", 1, trip)):
        status, _, err = memory(*arguments)
        assert (status, err) == (0, sentence)
    assert trip.read_bytes() == whole[:-9]
    status, out, err = memory("write", "--text", "number 2", trip)
    assert (status, out, err) == (0, "3. number 2\n", sentence)
    assert memory("list", trip)[2] == ""
    content = trip.read_bytes()
    trip.write_bytes(whole[: first + 30] + b"x" + whole[first + 31 :])
    assert "damaged" in memory("list", trip)[2]
    trip.write_bytes(content)
    assert memory("forget", "--entry", 2, trip)[0] == 0
    assert b"number 1" not in trip.read_bytes()
    assert os.listdir(tmp_path) == ["trip.mem"]


def test_a_write_under_a_taken_question_says_so_and_keeps_both(memory, bike, tmp_path):
    trip = tmp_path / "trip.mem"
    about = ("--question", "whose is this?", "--image", bike)
    assert memory("write", "--text", "mine", *about, trip)[2] == ""
    assert memory("write", "--text", "ours", "--question", "whose is this?", trip)[2] == ""
    status, out, err = memory("write", "--text", "yours", *about, "--json", trip)
    assert (status, json.loads(out)["entries"]) == (0, 3)
    assert err == "entry 1 was written under this question too; use overwrite to replace it\n"
    listed = json.loads(memory("list", "--json", trip)[1])["entries"]
    assert [(row["question"], len(row["picture"])) for row in listed] == [
        ("whose is this?", 64),
        ("whose is this?", 0),
        ("whose is this?", 64),
    ]
    assert "named on stderr" in memory("write", "--help")[1]


def test_a_sign_of_the_model_is_no_fact(memory, tmp_path):
    trip = tmp_path / "trip.mem"
    for text in ("tea <|end|> milk", "tea <image>"):
        status, _, err = memory("write", "--text", text, "--question", "what is hot?", trip)
        assert (status, err.count("\n")) == (2, 1)
        assert "it is one of the model's special tokens" in err
    assert not trip.exists()


def test_what_would_steer_a_terminal_is_printed_escaped(memory, tmp_path):
    trip = tmp_path / "trip.mem"
    bad = "tea\n  2. gone\x1b[2J\u202e\x9b"
    good = r"tea\n  2. gone\x1b[2J\u202e\x9b"
    assert memory("write", "--text", bad, "--question", "what?", trip)[1] == f"1. what? {good}\n"
    listed = memory("list", trip)[1].splitlines()
    assert (len(listed), listed[1].endswith(f"what? {good}")) == (2, True)
    assert memory("overwrite", "--text", bad, "--question", "what?", trip)[1].count(good) == 2
    assert memory("forget", "--entry", 1, trip)[1] == f"forgotten: what? {good}\n"


def test_json_is_one_document_a_command(memory, tmp_path, speaking_checkpoint):
    trip = tmp_path / "trip.mem"
    outcome = json.loads(memory("write", "--text", "a red heart", "--question", "what?", "--json", trip)[1])
    assert (outcome["written"]["entry"], outcome["entries"], outcome["memories"]) == (1, 1, 1)
    reading = json.loads(
        memory(
            "read",
            "--question",
            "what?",
            "--json",
            trip,
            "--model",
            speaking_checkpoint,
            "--backend",
            "torch",
        )[1]
    )
    assert {"answer", "recalled", "entry", "confidence", "source", "scope", "timings_ms"} <= reading.keys()
    assert (reading["entry"] is None) == (not reading["recalled"])
    listed = json.loads(memory("list", "--json", trip)[1])
    assert (listed["slots"], listed["entries"][0]["text"]) == (16, "what? a red heart")
    assert json.loads(memory("rebuild", "--json", trip)[1])["drift"] == 0
    assert json.loads(memory("reset", "--json", trip)[1]) == {"forgotten": 1, "entries": 0, "memories": 1}


@pytest.mark.posix
def test_refusals_are_one_sentence_and_status_2(memory, tmp_path):
    trip = tmp_path / "trip.mem"
    memory("write", "--text", "a red heart", trip)
    content = trip.read_bytes()
    cut_file, other_file = tmp_path / "cut.mem", tmp_path / "other.mem"
    cut_file.write_bytes(content[:-1])
    other_file.write_bytes(content)
    pipe = tmp_path / "pipe.mem"
    os.mkfifo(pipe)
    for arguments, sentence in (
        (("read", "--question", "what?", tmp_path / "none.mem"), "does not exist"),
        (("write", "--text", "long " * 300, trip), "more than the 255 of this model"),
        (("list", pipe), "is a pipe or a device"),
        (("write", "--text", "x", pipe), "is a pipe or a device"),
        (("forget", "--question", "never asked", trip), 'entry 1, asked for by "a red heart": '),
        (("reset", cut_file), "damaged"),
        (("list", cut_file), "damaged"),
        (("read", trip), "a question, a picture or both"),
        (("forget", trip), "say what to forget"),
        (("forget", "--entry", 7, trip), "there is no entry 7"),
        (("overwrite", "--text", "x", "--question", "never asked", trip), "nothing was written under that"),
        (("write", "--text", "x", "--image", tmp_path / "none.png", trip), "does not exist"),
        (("write", "--text", "x", tmp_path / "none" / "trip.mem"), "not saved"),
        (("reset", other_file, "--model", "nano"), "another model"),
    ):
        status, out, err = memory(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), arguments
        assert sentence in err
    assert trip.read_bytes() == content
