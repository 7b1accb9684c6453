"""Data folders: what the shard writer writes, the reader reads back, sample by sample; damage is one sentence."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from pathlib import Path

import msgspec
import pytest
import webdataset
from document_mutations import check_mutations

from microvlm.errors import UserError
from microvlm.training.data import shard_writer
from microvlm.training.data.caption_data import SPLITS, Turn, open_data
from microvlm.training.data.data_folder import DATA_FORMAT, DataSet, PictureSpan, SampleLine
from microvlm.training.data.images.conversation import Columns, find_images, find_turns
from microvlm.training.data.images.source_record import BadRecord
from microvlm.training.data.shard_writer import SplitWriter, StoredPicture


def picture(number: int, length: int = 700) -> StoredPicture:
    content = f"picture {number} ".encode() * length
    return StoredPicture(content, "png" if number % 2 else "jpg", hashlib.sha256(content).hexdigest())


def sample(number: int) -> tuple[str, list[StoredPicture], list[Turn]]:
    """One picture with a caption; each third sample is an episode of 11 pictures."""
    if number % 3:
        return f"{number:09d}", [picture(number)], [Turn(f"caption {number}")]
    pictures = [picture(number * 100 + k, 3 + k) for k in range(11)]
    turns = [Turn(f"number {k}", "what is this?", (k,)) for k in range(11)]
    return f"{number:09d}", pictures, [*turns, Turn("number 0", "what came first?", ())]


def finish(folder: Path, writers: dict[str, SplitWriter]) -> None:
    shards = {split: writer.save().shards for split, writer in writers.items()}
    (folder / "dataset.json").write_bytes(msgspec.json.encode(DataSet(DATA_FORMAT, shards)))


def write(folder: Path, count: int) -> Path:
    folder.mkdir()
    writer = SplitWriter(folder, "train")
    for number in range(count):
        writer.write(*sample(number))
    finish(folder, {"train": writer})
    return folder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_SAMPLES", 7)


def test_samples_are_read_back_in_any_order_with_all_their_pictures(tmp_path, small_shards):
    data = open_data(write(tmp_path / "data", 17))
    assert [data.count(split) for split in SPLITS] == [17, 0, 0]
    assert data.shard_sizes("train").tolist() == [7, 7, 3]
    for number in (16, 0, 8, 3):
        key, pictures, turns = sample(number)
        assert data.sample("train", number)[:3] == (key, tuple(p.content for p in pictures), tuple(turns))
    with pytest.raises(IndexError):
        data.sample("train", 17)
    with pytest.raises(ValueError, match="a split is one of train"):
        data.count("dev")


def test_texts_are_read_without_the_shards(tmp_path):
    folder = write(tmp_path / "data", 4)
    (folder / "train-00000.tar").unlink()
    texts = list(open_data(folder).texts("train"))
    assert texts[:3] == ["what is this?", "number 0", "what is this?"]
    assert texts[24:26] == ["caption 1", "caption 2"]


def test_shards_are_webdataset_shards(tmp_path):
    folder = write(tmp_path / "data", 3)
    rows = list(
        webdataset.WebDataset(str(folder / "train-00000.tar"), shardshuffle=False, empty_check=False).decode()
    )
    assert [row["__key__"] for row in rows] == [f"{n:09d}" for n in range(3)]
    assert rows[1]["json"]["turns"][0]["answer"] == "caption 1"
    assert {"0.jpg", "9.png", "10.jpg"} <= set(rows[0])


def test_an_opened_folder_can_be_sent_to_another_process(tmp_path):
    data = open_data(write(tmp_path / "data", 3))
    first = data.sample("train", 1)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.sample("train", 1) == first
    assert len(pickle.dumps(data)) < 2000


def test_a_writer_goes_on_after_its_last_save_and_the_bytes_are_those_of_an_unbroken_one(
    tmp_path, small_shards
):
    whole = write(tmp_path / "whole", 17)
    broken = tmp_path / "broken"
    broken.mkdir()
    writer = SplitWriter(broken, "train")
    for start, stop, lost in ((0, 5, 9), (5, 14, 14), (14, 16, 17), (16, 17, 17)):
        for number in range(start, stop):
            writer.write(*sample(number))
        progress = writer.save()
        assert writer.samples == stop
        with tarfile.open(broken / f"{progress.shards[-1].name}.tar") as archive:
            assert len({m.name.split(".")[0] for m in archive}) == progress.shards[-1].samples
        for number in range(stop, lost):  # written, and never saved: the writer is killed
            writer.write(*sample(number + 50))
        writer = SplitWriter(broken, "train", progress)
    finish(broken, {"train": writer})
    for path in whole.iterdir():
        assert (broken / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("train-00000.tar", lambda content: content[:-512], "is not the shard that dataset.json describes"),
        ("train-00000.tar", None, "is missing"),
        ("train-00000.jsonl", lambda content: content[:-9], "is not the index that dataset.json describes"),
        ("train-00000.jsonl", None, "is missing"),
        (
            "train-00000.jsonl",
            lambda content: content.replace(b"answer", b"unswer"),
            "'turns[0].answer' is missing",
        ),
        (
            "train-00000.jsonl",
            lambda c: c.replace(b'"images":[0]', b'"images":[9]'),
            "a turn names a picture",
        ),
        ("dataset.json", lambda content: content[:-1], "is not valid JSON"),
        ("dataset.json", lambda content: content.replace(b"images-1", b"images-9"), "is not in the format"),
        ("dataset.json", lambda c: c.replace(b"train-00000", b"../../etc/a"), "shards"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tmp_path, name, damage, sentence):
    folder = write(tmp_path / "data", 3)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(UserError) as caught:
        open_data(folder).sample("train", 1)
    assert sentence in str(caught.value)
    assert "build it again with microvlm-data images" in str(caught.value)


def test_what_is_no_data_folder_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; make it with microvlm-data images SOURCE -o"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no dataset\.json.* microvlm-data images .* -o DIR"):
        open_data(tmp_path)
    (tmp_path / "mine.partial").mkdir()
    with pytest.raises(UserError, match=r"is not finished: run the same microvlm-data images"):
        open_data(tmp_path / "mine")


def test_every_mutation_of_a_description_or_an_index_is_read_or_refused(tmp_path):
    folder = write(tmp_path / "data", 3)
    description, index = folder / "dataset.json", folder / "train-00000.jsonl"
    document = msgspec.json.decode(description.read_bytes())

    def read_description(content: bytes) -> None:
        description.write_bytes(content)
        data = open_data(folder)
        assert all(data.sample("train", n).images for n in range(min(3, data.count("train"))))
        assert len(list(data.texts("train"))) in (0, 26)

    assert check_mutations(document, read_description, least_refused=0.3) > 100
    lines = index.read_bytes().splitlines()

    def read_index(content: bytes) -> None:
        index.write_bytes(b"\n".join([lines[0], content, lines[2], b""]))
        document["shards"]["train"][0]["index_bytes"] = index.stat().st_size
        description.write_bytes(msgspec.json.encode(document))
        assert open_data(folder).sample("train", 1).turns

    assert check_mutations(msgspec.json.decode(lines[1]), read_index) > 100


def test_every_mutation_of_a_conversation_becomes_turns_or_a_reason():
    def read(content: bytes) -> None:
        row = msgspec.json.decode(content)
        if not isinstance(row, dict):
            raise UserError("no object")
        try:
            pictures = len(find_images(row, Columns()))
            turns, _ = find_turns(row, Columns(), pictures, 1000)
        except BadRecord as problem:
            raise UserError(f"{problem.reason} {problem.detail}") from None
        # What was found is what a shard's index takes.
        spans = tuple(PictureSpan(0, 1, "0" * 64) for _ in range(pictures))
        line = SampleLine("0", spans, turns)
        assert msgspec.json.decode(msgspec.json.encode(line), type=SampleLine) == line

    def read_line(content: bytes) -> None:
        try:
            read(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise UserError("no JSON") from None

    row = {
        "images": ["a.jpg", "b.jpg"],
        "turns": [
            {"answer": "a cat", "images": [0]},
            {"question": "what was first?", "answer": "a cat", "images": []},
        ],
        "caption": "two animals",
    }
    assert check_mutations(row, read_line, least_refused=0.3) > 100
