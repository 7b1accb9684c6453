"""`microvlm-data images` reads every layout of captioned pictures, and refuses what is none with the next step."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from captioned_sources import (
    build,
    picture,
    refuse,
    write_captions,
    write_csv,
    write_lines,
    write_pictures,
    write_tar,
)

from microvlm.training.data.caption_data import SPLITS, Turn, open_data


def captions(folder) -> dict[bytes, list[str]]:
    """Picture -> answers, over all splits."""
    data = open_data(folder)
    samples = [data.sample(split, n) for split in SPLITS for n in range(data.count(split))]
    return {sample.images[0]: [turn.answer for turn in sample.turns] for sample in samples}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_captions_jsonl_with_relative_paths(tmp_path, out):
    summary = build(write_captions(tmp_path, 30), "-o", out)
    assert summary["kept"] == summary["read"] == 30
    assert captions(out)[picture(7)] == ["picture number 7"]
    assert {path.suffix for path in out.iterdir()} == {".json", ".jsonl", ".tar", ".jpg"}


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_tables_keep_texts_that_look_like_numbers_or_nothing(tmp_path, out, suffix, delimiter):
    names = write_pictures(tmp_path, 4)
    texts = ["NA", "001", 'a cat, a dog; a "bird"', "two\nlines"]
    table = write_csv(
        tmp_path / f"list{suffix}",
        ["file_name", "text"],
        [list(r) for r in zip(names, texts, strict=True)],
        delimiter,
    )
    build(table, "-o", out)
    assert [captions(out)[picture(n)] for n in range(4)] == [["NA"], ["001"], [texts[2]], ["two lines"]]


def test_json_documents_of_records_and_of_coco(tmp_path, out):
    names = write_pictures(tmp_path, 2)
    (tmp_path / "list.json").write_text(json.dumps([{"image": n, "captions": ["a", "b"]} for n in names]))
    build(tmp_path / "list.json", "-o", out)
    assert captions(out)[picture(1)] == ["a", "b"]
    coco = {
        "images": [{"id": 3, "file_name": names[0]}, {"id": 4, "file_name": names[1]}],
        "annotations": [{"image_id": 4, "caption": "one"}, {"image_id": 4, "caption": "two"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert build(tmp_path / "coco.json", "-o", tmp_path / "coco")["skipped"] == {"no caption": 1}
    assert captions(tmp_path / "coco") == {picture(1): ["one", "two"]}


def test_columns_are_named_where_they_are_not_guessed(tmp_path, out):
    names = write_pictures(tmp_path, 2)
    table = write_csv(
        tmp_path / "a.csv", ["bild", "text", "satz"], [[n, "wrong", f"right {n}"] for n in names]
    )
    assert "--image-column" in refuse(table, "-o", out)
    assert "has no column wort" in refuse(
        table, "-o", out, "--image-column", "bild", "--caption-column", "wort"
    )
    build(table, "-o", out, "--image-column", "bild", "--caption-column", "satz")
    assert captions(out)[picture(1)] == ["right 0001.png"]


def test_a_folder_with_captions_beside_its_pictures(tmp_path, out):
    folder = tmp_path / "mine"
    names = write_pictures(folder / "deep", 4)
    (folder / "deep" / "0000.txt").write_text("from a text\n")
    (folder / "deep" / "0001.caption").write_text("\ufefffrom a caption", encoding="utf-8")
    (folder / "deep" / "0002.json").write_text('{"question": "what is it?", "answer": "a thing"}')
    summary = build(folder, "-o", out)
    assert summary["skipped"] == {"no caption": 1}
    assert captions(out) == {
        picture(0): ["from a text"],
        picture(1): ["from a caption"],
        picture(2): ["a thing"],
    }
    assert json.loads((out / "skipped.jsonl").read_text())["place"] == f"deep/{names[3]}"


def test_a_folder_per_label_is_said_aloud(tmp_path, out):
    write_pictures(tmp_path / "mine" / "golden_retriever", 2)
    write_pictures(tmp_path / "mine" / "cat", 2, 5)
    from drawn_emoji import run

    result = run("images", tmp_path / "mine", "-o", out, "--workers", "0")
    assert "each folder's name is their caption" in result.stderr
    assert captions(out)[picture(0)] == ["golden retriever"]


def test_a_hugging_face_imagefolder(tmp_path, out):
    names = write_pictures(tmp_path / "mine" / "train", 3)
    write_lines(
        tmp_path / "mine/train/metadata.jsonl", [{"file_name": n, "text": f"it is {n}"} for n in names]
    )
    build(tmp_path / "mine", "-o", out)
    assert captions(out)[picture(2)] == ["it is 0002.png"]


def img2dataset_shard(path, start=0, count=5):
    members = []
    for n in range(start, start + count):
        text = {"caption": f"caption {n}", "status": "success", "url": "http://a.example/b.jpg"}
        members += [
            (f"{n:09d}.jpg", picture(n, kind="JPEG")),
            (f"{n:09d}.json", json.dumps(text).encode()),
            (f"{n:09d}.txt", f"caption {n}".encode()),
        ]
    return write_tar(path, members)


def test_shards_of_img2dataset_from_their_folder_a_pattern_and_one_file(tmp_path, out):
    for n in range(3):
        img2dataset_shard(tmp_path / f"shards/{n:05d}.tar", 5 * n)
        (tmp_path / f"shards/{n:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"shards/{n:05d}_stats.json").write_text("{}")
    assert build(tmp_path / "shards", "-o", out)["kept"] == 15
    assert captions(out)[picture(14, kind="JPEG")] == ["caption 14"]
    assert build(tmp_path / "shards" / "0000?.tar", "-o", tmp_path / "b")["kept"] == 15
    assert build(str(tmp_path / "shards") + "/{00000..00001}.tar", "-o", tmp_path / "c")["kept"] == 10
    assert build(tmp_path / "shards/00002.tar", "-o", tmp_path / "d")["kept"] == 5


def test_our_own_shards_are_read_again_with_all_their_turns(tmp_path, out):
    write_pictures(tmp_path, 3)
    row = {
        "images": ["0000.png", "0001.png", "0002.png"],
        "turns": [
            {"answer": "first", "images": [0]},
            {"answer": "both", "question": "what now?", "images": [1, 2]},
            {"answer": "first", "question": "what came first?", "images": []},
        ],
    }
    build(write_lines(tmp_path / "a.jsonl", [row]), "-o", out)
    build(out / "train-00000.tar", "-o", tmp_path / "again")
    sample = open_data(out).sample("train", 0)
    assert sample == open_data(tmp_path / "again").sample("train", 0)
    assert sample.images == tuple(picture(n) for n in range(3))
    assert sample.turns == (
        Turn("first"),
        Turn("both", "what now?", (1, 2)),
        Turn("first", "what came first?", ()),
    )


def hub_rows(count):
    return {
        "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in range(count)],
        "text": [f"row {n}" for n in range(count)],
        "other": [{"bytes": b"no picture", "path": None}] * count,
    }


@pytest.fixture
def features():
    datasets = pytest.importorskip("datasets")
    image = datasets.Image()
    return datasets.Features({"image": image, "text": datasets.Value("string"), "other": image})


def test_parquet_with_pictures_inside_a_repositorys_folder_and_a_saved_one(tmp_path, out, features):
    import datasets

    rows = datasets.Dataset.from_dict(hub_rows(6), features=features)
    (tmp_path / "repo" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet")
    for name, source in (
        ("of_file", tmp_path / "repo/data/train-00000-of-00001.parquet"),
        ("of_repo", tmp_path / "repo"),
    ):
        assert build(source, "-o", tmp_path / name)["kept"] == 6
        assert captions(tmp_path / name)[picture(5)] == ["row 5"]
    rows.save_to_disk(tmp_path / "saved")
    assert build(tmp_path / "saved", "-o", out)["kept"] == 6
    assert "give --hub-split train" in refuse(tmp_path / "repo", "-o", tmp_path / "x", "--hub-split", "dev")


def test_class_labels_and_lists_of_pictures_of_a_data_set(tmp_path, out):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a_cat", "a_dog"])}
    )
    rows = {"img": [{"bytes": picture(n), "path": None} for n in range(2)], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "labels.parquet")
    build(tmp_path / "labels.parquet", "-o", out)
    assert captions(out) == {picture(0): ["a dog"], picture(1): ["a cat"]}
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "captions": datasets.List(datasets.Value("string"))}
    )
    rows = {
        "images": [[{"bytes": picture(n), "path": None} for n in (3, 4)]],
        "captions": [["three", "four"]],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "lists.parquet")
    build(tmp_path / "lists.parquet", "-o", tmp_path / "lists")
    sample = open_data(tmp_path / "lists").sample("train", 0)
    assert sample.turns == (Turn("three", None, (0,)), Turn("four", None, (1,)))


def test_parquet_that_names_files(tmp_path, out):
    datasets = pytest.importorskip("datasets")
    names = write_pictures(tmp_path, 3)
    datasets.Dataset.from_dict(
        {"path": [*names, "http://x.example/a.jpg"], "title": list("abcd")}
    ).to_parquet(tmp_path / "a.parquet")
    assert build(tmp_path / "a.parquet", "-o", out)["skipped"] == {"a URL, not a file": 1}
    assert captions(out)[picture(2)] == ["c"]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert "cut.parquet cannot be read" in refuse(tmp_path / "cut.parquet", "-o", tmp_path / "cut")


def test_reading_parquet_leaves_nothing_in_the_users_home(tmp_path, out):
    datasets = pytest.importorskip("datasets")
    import os
    import subprocess
    import sys

    home = tmp_path / "home"
    home.mkdir()
    names = write_pictures(tmp_path, 3)
    datasets.Dataset.from_dict({"image": names, "text": names}).to_parquet(tmp_path / "a.parquet")
    unset = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    program = "from microvlm.cli import data; data()"
    process = subprocess.run(
        [sys.executable, "-c", program, "images", str(tmp_path / "a.parquet"), "-o", str(out), "--json"],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["kept"] == 3
    assert list(home.rglob("*")) == []


def test_several_sources_are_one_data_set(tmp_path, out):
    write_captions(tmp_path / "a", 5)
    img2dataset_shard(tmp_path / "b" / "00000.tar", 100)
    summary = build(tmp_path / "a" / "captions.jsonl", tmp_path / "b", "-o", out)
    assert summary["kept"] == 10
    sources = json.loads((out / "dataset.json").read_text())["sources"]
    assert [(source["kind"], source["name"]) for source in sources] == [
        ("table", "captions.jsonl"),
        ("shards", "00000.tar"),
    ]
    assert str(tmp_path) not in (out / "dataset.json").read_text()


def test_a_source_that_is_none_is_one_sentence_with_the_next_step(tmp_path, out):
    write_pictures(tmp_path / "bare", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "two").mkdir()
    for name in ("captions.csv", "metadata.csv"):
        (tmp_path / "two" / name).write_text("image,caption\n")
    for source, words in (
        (tmp_path / "nothing.jsonl", "does not exist; give a folder, captions"),
        ("https://a.example/list.csv", "download it first"),
        (tmp_path / "bare", "write a.txt beside a.jpg"),
        (tmp_path / "bare" / "0000.png", "is one picture; give its folder"),
        (tmp_path / "empty", "holds no pictures, captions or shards"),
        (tmp_path / "a.zip", "is compressed; unpack it first"),
        (tmp_path / "two", "give the one that is meant"),
        (tmp_path / "*.tar", "fits no .tar or .parquet files"),
        ("a\0b", "does not exist"),
    ):
        assert words in refuse(source, "-o", out), source
        assert not out.exists()
    build(write_captions(tmp_path / "good", 2), "-o", out)
    assert "is a data folder already" in refuse(out, "-o", tmp_path / "other")


def test_the_records_of_the_documentation_are_read(tmp_path, out):
    page = (Path(__file__).parent.parent / "docs" / "data-format.md").read_text(encoding="utf-8")
    rows = re.search(r"```json\n(.*?)```", page, re.DOTALL)[1].splitlines()
    pictures = {name for row in rows for name in re.findall(r"\w+\.jpg", row)}
    for number, name in enumerate(sorted(pictures)):
        (tmp_path / name).write_bytes(picture(number, kind="JPEG"))
    summary = build(write_lines(tmp_path / "a.jsonl", rows), "-o", out, "--validation", "0", "--test", "0")
    assert (summary["kept"], summary["skipped"]) == (len(rows), {})
    data = open_data(out)
    turns = [data.sample("train", n).turns for n in range(len(rows))]
    assert turns[0] == (Turn("a cat on a chair"),)
    assert turns[4] == (Turn("a cat on a chair", None, (0,)), Turn("a dog in the snow", None, (1,)))
    assert turns[5] == (Turn("a lamp", "what is new?", (0, 1)),)
    assert turns[6][2] == Turn("a cat", "what was in the first picture?", ())


@pytest.mark.parametrize("rows", [[], ['{"image": "gone.png", "caption": "a"}']])
def test_nothing_usable_writes_nothing(tmp_path, out, rows):
    message = refuse(write_lines(tmp_path / "a.jsonl", rows), "-o", out)
    assert "no record in it" in message or "none of 1 records can be used: missing picture (1)" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
