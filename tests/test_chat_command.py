"""`microvlm chat` on a pipe, and `microvlm info` on both kinds of model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import files_below
from PIL import Image

from microvlm.bench.evalset_reader import load_evalset
from microvlm.commands.chat import LONGEST_LINE, ChatLoop, _read_line, _split_path
from microvlm.commands.main import cli
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.memory.ordinal_questions import place_asked_for


@pytest.fixture
def chat(capsys, monkeypatch, speaking_bundle):
    """Lines and flags -> (status, stdout, stderr)."""

    def call(lines: str, *flags: str, model: object = speaking_bundle) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as exit_info:
            run_click(cli, ["chat", "--model", str(model), "--max-new-tokens", "3", *flags])
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "my cat.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def test_a_conversation_carries_on_in_its_file_with_another_backend(
    chat, picture, tmp_path, speaking_checkpoint
):
    trip = str(tmp_path / "trip.mem")
    status, _, _ = chat(f"/image {picture}\nwhat is this?\n", "--memory", trip, "--backend", "ort")
    assert status == 0
    status, out, err = chat("/memory\n/quit\nnever read\n", "--memory", trip, model=speaking_checkpoint)
    assert status == 0
    assert "2 entries in a memory of 16 slots" in out
    assert "my cat.png: describe the image" in out
    assert "my cat.png: what is this?" in out
    assert "trip.mem: 2 entries" in err


@pytest.mark.parametrize(
    ("name", "typed_path"),
    [
        ("my cat.png", r"my\ cat.png"),
        ("my cat.png", "'my cat.png'"),
        ("my cat.png", '"my cat.png"'),
        ("my cat.png", "my' 'cat.png"),
        ("it's.png", "it's.png"),
        ("it's.png", r"it\'s.png"),
        ("it's.png", '"it\'s.png"'),
        (r"back\slash.png", r"back\slash.png"),
        (r"back\slash.png", r"back\\slash.png"),
        ("a#b.png", "a#b.png"),
    ],
)
@pytest.mark.parametrize("question", ["what is this?", "what's this?", "\"what\" is 'this'?"])
def test_a_path_is_parted_from_its_question_as_a_terminal_writes_it(
    name, typed_path, question, picture, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    assert _split_path(f"{typed_path} {question}") == (name, question)
    assert _split_path(typed_path) == (name, "")


def test_a_question_for_an_earlier_image_goes_to_the_memory_and_not_to_the_image_in_view(monkeypatch):
    questions = []
    loop = ChatLoop(None, None)
    monkeypatch.setattr(
        loop, "_ask", lambda question, image, is_new=False: questions.append((question, image))
    )
    loop.image = "rose.png"
    for line in ("what is this?", "What was in the first image?", "what was in the eleventh image?"):
        loop.handle(line)
    assert questions == [
        ("what is this?", "rose.png"),
        ("What was in the first image?", None),
        ("what was in the eleventh image?", None),
    ]


def test_a_place_that_no_picture_has_is_refused_and_not_stored(chat, picture, tmp_path):
    trip = str(tmp_path / "trip.mem")
    lines = f"/image {picture}\nwhat was in the ninth image\n/recall What was in the 2nd photo?\n/memory\n"
    status, out, err = chat(lines, "--memory", trip)
    assert status == 2
    assert "no picture was shown as the ninth, the memory has 1: ask for one of those." in err
    assert "no picture was shown as the second" in err
    assert "1 entry in a memory" in out


def test_a_picture_that_is_dropped_on_the_terminal_is_shown(chat, picture, tmp_path):
    trip = str(tmp_path / "trip.mem")
    status, out, err = chat(f"{picture}\n'{picture}'\n/memory\n", "--memory", trip)
    assert (status, "Error" in err) == (0, False)
    assert "2 entries in a memory of 16 slots" in out
    assert out.count("my cat.png: describe the image") == 2
    assert chat(f"{tmp_path}/none.png\n")[0] == 2


@pytest.mark.parametrize(
    ("question", "place"),
    [
        ("what was in the first image?", 0),
        ("What was  in the SECOND picture", 1),
        ("what is on the 3rd photo!", 2),
        ("what was in the 21st image?", 20),
        ("what was in the 0th image?", None),
        ("what was in the red image?", None),
        ("what was in the first image of the day?", None),
    ],
)
def test_a_place_is_asked_for_in_several_ways(question, place):
    assert place_asked_for(question) == place


def test_a_path_that_is_not_there_is_named_as_it_was_meant(chat):
    assert r"Error: no such.png does not exist" in chat("/image no\\ such.png what is this?\n")[2]


def test_reset_empties_the_memory_and_the_file(chat, picture, tmp_path):
    trip = str(tmp_path / "trip.mem")
    chat(f'/image "{picture}" what is this?\n/reset\n', "--memory", trip)
    _, out, _ = chat("/memory\n", "--memory", trip)
    assert "0 entries" in out


def test_mistakes_are_sentences_and_the_conversation_goes_on(chat, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    lines = (
        f"/image\n/image {tmp_path}/none.png\n/image {text}\n/fly\n/recall\nhi <image>\n\n/help\n/memory\n"
    )
    status, out, err = chat(lines)
    assert status == 2, "a script reads no sentences"
    assert err.count("Error: ") == 6
    for part in (
        "/image PATH",
        "does not exist",
        "not a picture",
        "unknown command '/fly'",
        "after /recall",
        "<image>",
    ):
        assert part in err
    assert "0 entries" in out
    assert "/recall QUESTION" in out


def test_a_byte_order_mark_before_the_first_line_is_not_part_of_it(chat):
    status, out, err = chat("\ufeff/memory\n")
    assert (status, err) == (0, "")
    assert "0 entries" in out


def test_a_line_that_is_too_long_is_refused_and_the_next_one_answered(chat, speaking_bundle):
    """A name that is too long for the file system once ended the conversation."""
    status, out, err = chat(f"/image {'x' * 5000}.png what is this?\n{'y ' * 60_000}\n/memory\n")
    assert status == 2
    assert err.count("Error: ") == 2
    assert len(err) < 5000
    assert "0 entries" in out


def test_a_line_without_an_end_is_not_kept_whole(monkeypatch):
    class Endless(io.StringIO):
        longest = 0

        def readline(self, size: int = -1) -> str:
            assert size > 0, "an endless line would fill the memory"
            line = super().readline(size)
            self.longest = max(self.longest, len(line))
            return line

    stream = Endless("z" * 2_500_000 + "\nnext\n")
    first, second, end = (_read_line(stream) for _ in range(3))
    assert len(first) > LONGEST_LINE
    assert (second, end) == ("next\n", "")
    assert stream.longest <= LONGEST_LINE + 2
    with pytest.raises(UserError, match="more than 1,000,000 characters"):
        ChatLoop(None, None).handle(first)
    monkeypatch.setattr("microvlm.commands.chat._ENDLESS", 2_000_000)
    with pytest.raises(UserError, match="no line end in 2,000,000 characters"):
        _read_line(io.StringIO("z" * 4_000_000))


@pytest.mark.posix
def test_a_turn_that_cannot_be_saved_does_not_end_the_conversation(chat, picture, tmp_path):
    trip = tmp_path / "trip.mem"
    chat(f"/image {picture}\n", "--memory", str(trip))
    size = trip.stat().st_size
    with files_below(size // 2):
        status, out, err = chat(f"/image {picture} why?\n/memory\n", "--memory", str(trip))
    assert status == 2
    assert "Error: " in err
    assert "in a memory of 16 slots" in out
    assert trip.stat().st_size >= size


@pytest.mark.posix
def test_a_person_at_a_terminal_has_seen_the_mistake(speaking_bundle):
    ours, theirs = os.openpty()
    chat = "import sys; from microvlm.commands.main import main; sys.argv[0] = 'microvlm'; main()"
    command = [sys.executable, "-c", chat, "chat", "--model", str(speaking_bundle), "--backend", "ort"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        os.write(ours, b"/fly\n/memory\n/quit\n")
        out, err = process.communicate(timeout=300)
        os.close(ours)
    assert process.returncode == 0, err
    assert "unknown command '/fly'" in err
    assert "/quit leaves" in err
    assert "0 entries" in out


def test_a_memory_that_cannot_be_read_or_written_ends_with_status_2(chat, tmp_path):
    bad = tmp_path / "bad.mem"
    bad.write_text("no memory")
    status, _, err = chat("hello\n", "--memory", str(bad))
    assert (status, "damaged" in err) == (2, True)
    status, _, err = chat("hello\n", "--memory", str(tmp_path / "none" / "trip.mem"))
    assert (status, "not saved" in err) == (2, True)
    assert bad.read_text() == "no memory"


def test_caption_reads_a_memory_and_does_not_change_it(chat, picture, tmp_path, speaking_bundle, capsys):
    trip = tmp_path / "trip.mem"
    chat(f"/image {picture}\n", "--memory", str(trip))
    before = trip.read_bytes()
    with pytest.raises(SystemExit) as exit_info:
        run_click(
            cli, ["caption", str(picture), "--model", str(speaking_bundle), "--memory", str(trip), "--json"]
        )
    assert exit_info.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert ("memory_read" in document["timings_ms"], document["memory"]) == (True, None)
    assert trip.read_bytes() == before


def caption(capsys, *arguments: object) -> dict:
    with pytest.raises(SystemExit) as exit_info:
        run_click(cli, ["caption", *map(str, arguments), "--json"])
    assert exit_info.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_a_fact_that_was_told_in_a_chat_answers_there_and_in_caption_by_its_own_text(chat, tmp_path, capsys):
    trip = tmp_path / "trip.mem"
    drawing = load_evalset().images[0]
    Image.fromarray(load_evalset().pixels(drawing.file)).save(tmp_path / "thing.png")
    lines = f"/image {tmp_path}/thing.png\n/tell whose is this? tulip42\nwhose is this?\n/memory\n"
    status, out, err = chat(lines, "--memory", str(trip), model="nano")
    assert (status, out.splitlines()[1]) == (0, "tulip42")
    assert "remembered: thing.png: whose is this? tulip42" in err
    assert "(from the memory, confidence" in err
    assert "2 entries in a memory" in out
    picture = (tmp_path / "thing.png", "--model", "nano")
    told = caption(capsys, *picture, "--memory", trip, "--prompt", "whose is this?")
    assert (told["caption"], told["memory"]["entry"]) == ("tulip42", 2)
    assert 0 <= told["memory"]["confidence"] <= 1
    # What the chat said of the picture before is no fact, and another question is answered from the picture.
    without, with_memory = caption(capsys, *picture), caption(capsys, *picture, "--memory", trip)
    assert (with_memory["caption"], with_memory["memory"]) == (without["caption"], None)


@pytest.mark.parametrize("line", ["/tell", "/tell whose is this?", "/tell ? anna"])
def test_a_fact_without_an_answer_is_refused_with_an_example(line, chat):
    status, _, err = chat(f"{line}\n")
    assert (status, "/tell whose is this? anna" in err) == (2, True)


def info(model: object, capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run_click(cli, ["info", str(model), *flags])
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def test_info_counts_the_parameters_of_the_model_in_checkpoint_and_bundle(
    speaking_checkpoint, speaking_bundle, ternary_model, capsys
):
    described = [
        json.loads(info(model, capsys, "--json")) for model in (speaking_checkpoint, speaking_bundle)
    ]
    expected = sum(parameter.numel() for parameter in ternary_model.parameters())
    assert [document["kind"] for document in described] == ["checkpoint", "bundle"]
    assert [document["parts"]["total"]["parameters"] for document in described] == [expected, expected]
    checkpoint_parts, bundle_parts = (document["parts"] for document in described)
    assert checkpoint_parts["decoder"]["bits_per_weight"] == 32
    assert {part: row["parameters"] for part, row in checkpoint_parts.items()} == {
        part: row["parameters"] for part, row in bundle_parts.items()
    }
    assert described[1]["backends"]["ort"].startswith("runs its graphs, quantised layers by ")


def test_info_measures_the_bits_of_the_ternary_weights_on_disk(speaking_bundle, capsys):
    ternary = json.loads(info(speaking_bundle, capsys, "--json"))["ternary_linears"]
    # Two bits, padded rows, and four bytes of scale a layer.
    assert 2.0 <= ternary["bits_per_weight"] <= 2.06
    table = info(speaking_bundle, capsys)
    assert "bits/weight" in table
    assert "predicted sizes" in table


def test_info_on_nothing_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_click(cli, ["info", "no-such-model"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("Error: there is no model 'no-such-model'")
