"""Composed pictures, the questions about them and their answers, by hand and by pixels."""

import io
import json
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from microvlm.errors import UserError
from microvlm.training.photo.batches.class_targets import UNTOLD, Classes
from microvlm.training.photo.batches.picture_questions import (
    Questioner,
    caption,
    is_beside,
    side_of,
    thing_at,
)
from microvlm.training.photo.batches.virtual_pictures import VirtualPictures
from microvlm.training.photo.data import canvas
from microvlm.training.photo.data.builder import generator, read_texts, split_of_part
from microvlm.training.photo.data.captioned_pictures import sentence
from microvlm.training.photo.data.class_names import class_names
from microvlm.training.photo.data.colours import COLOURS, NAMES, shade
from microvlm.training.photo.data.composer import MIXTURE, WHOLE, Composer, Description, Thing
from microvlm.training.photo.data.held_out_pictures import write_pictures
from microvlm.training.photo.data.sources import (
    CALIBRATION_VENDOR,
    TEST_VENDOR,
    TRAIN_VENDORS,
    Sources,
    read_shard,
    split_of,
)

CAT = Thing("cat", (0.0, 0.4, 0.2, 0.6))
DOG = Thing("dog", (0.4, 0.4, 0.6, 0.6))
PEAR = Thing("kite", (0.8, 0.4, 1.0, 0.6))
ROW = Description("scene", (DOG, PEAR, CAT), "red")


def write_shard(path, source, labels):
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            picture = Image.fromarray(np.full((40, 60, 3), number * 3 % 256, np.uint8))
            picture.save(jpeg := io.BytesIO(), "JPEG")
            key = f"{source}/{label}/image_{number:04d}.jpg"
            document = {"key": key, "label": label, "source": source}
            for ending, content in (("jpg", jpeg.getvalue()), ("json", json.dumps(document).encode())):
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def sources(drawn_build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    labels = ["red mug", "old chair", "lamp", None] * 30
    return Sources.open([write_shard(folder / "photos.tar", "mine", labels)], drawn_build[0])


def test_places_and_relations_by_hand():
    assert is_beside(CAT, "left", DOG)
    assert not is_beside(CAT, "right", DOG)
    assert not is_beside(CAT, "above", DOG)
    assert is_beside(Thing("x", (0.4, 0.0, 0.6, 0.2)), "above", DOG)
    # Half left of it and half above it: neither is clear.
    assert not any(
        is_beside(Thing("x", (0.2, 0.2, 0.4, 0.4)), side, DOG) for side in ("left", "above", "right", "below")
    )
    assert thing_at(ROW.things, "left") == CAT
    assert thing_at(ROW.things, "right") == PEAR
    assert thing_at(ROW.things, "middle") == DOG
    assert thing_at(ROW.things, "top") is None
    assert [side_of(thing) for thing in (CAT, DOG, PEAR)] == ["left", "middle", "right"]
    assert side_of(Thing("x", (0.0, 0.0, 0.2, 0.2))) is None


def test_captions_by_hand():
    assert caption(ROW) == "a cat, a dog and a kite from left to right"
    assert caption(Description("scene", (DOG, CAT))) == "a cat left of a dog"
    assert caption(Description("count", (CAT, DOG, CAT))) == "two cats and a dog"
    assert caption(Description("photo", (Thing("lamp", WHOLE),))) == "lamp"
    assert caption(Description("coloured", (Thing("lamp", WHOLE, "blue"),))) == "blue lamp"
    assert caption(Description("clutter", ())) == "i don't know what this is"
    assert caption(Description("unnamed", (Thing(None, WHOLE),))) == "i don't know what this is"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_right_for_every_kind_of_question(split):
    questioner, rng = Questioner(["cat", "dog", "kite", "lamp", "boat"], split), np.random.default_rng(0)
    answers = {}
    for _ in range(400):
        asked = questioner.ask(ROW, rng)
        answers.setdefault(asked.kind, set()).add(asked.answer)
        if asked.kind == "is_there":
            is_shown = any(name in asked.question for name in ("cat", "dog", "kite", "animal"))
            assert asked.answer == ("yes" if is_shown else "no"), asked
        if asked.kind == "where" and any(name in asked.question for name in ("lamp", "boat")):
            assert asked.answer in ("i don't see a lamp", "i don't see a boat")
    assert answers["how_many"] == {"three"}
    assert answers["ground"] == {"red"}
    assert answers["between"] == {"dog"}
    assert answers["what_at"] == {"cat", "dog", "kite"}
    assert answers["where"] >= {"on the left", "in the middle", "on the right"}
    assert answers["not_understood"] == {"i don't understand the question"}
    assert answers["is_at"] == {"yes", "no"}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_questions_about_kinds_are_answered_by_what_is_of_them(split):
    questioner, rng = Questioner(["dog", "animal", "cat", "lamp"], split), np.random.default_rng(0)
    beagle = Description("photo", (Thing("beagle", WHOLE),))
    asked = [
        row
        for row in (questioner.ask(beagle, rng) for _ in range(1500))
        if row.kind in ("what_kind", "is_it", "is_there")
    ]
    said = {
        kind: Counter(row.answer for row in asked if row.kind == kind)
        for kind in ("what_kind", "is_it", "is_there")
    }
    assert set(said["what_kind"]) == {"beagle", "i don't see one"}
    assert set(said["is_it"]) == set(said["is_there"]) == {"yes", "no"}
    for row in asked:
        of_it = re.search(r"\b(dog|animal|beagle)\b", row.question) is not None
        assert (row.answer in ("yes", "beagle")) == of_it, row


def test_the_classes_names_are_a_thousand_in_the_encoders_order():
    names = class_names()
    assert len(names) == 1000
    assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")


def test_splits_are_by_key_and_neighbours_of_a_series_stay_together(tmp_path):
    assert split_of("a") == split_of("a")
    counts = Counter(split_of(f"picture {number}") for number in range(2000))
    assert counts["train"] / 2000 == pytest.approx(0.8, abs=0.03)
    shard = write_shard(tmp_path / "grocery.tar", "grocery", ["apple"] * 50)
    photos = Sources.open([shard], None).photos
    numbers = {
        split: [int(p.key[-8:-4]) for p in photos if p.split == split]
        for split in ("train", "calibration", "test")
    }
    assert (
        max(numbers["train"])
        < min(numbers["calibration"])
        <= max(numbers["calibration"])
        < min(numbers["test"])
    )
    other = write_shard(tmp_path / "samples.tar", "imagenet-sample", ["tench"] * 20)
    assert {photo.split for photo in read_shard(other)} == {"test"}


def test_a_sample_is_a_function_of_its_generator_and_shows_what_it_says(sources):
    composer = Composer(sources, "train")
    for kind in MIXTURE:
        first, again = (composer.sample(kind, generator(1, "train", 3)) for _ in range(2))
        assert first.pixels.shape == (256, 256, 3)
        assert first.pixels.dtype == np.uint8
        assert np.array_equal(first.pixels, again.pixels)
        assert first.description == again.description
    rng = np.random.default_rng(0)
    kinds = {kind: composer.sample(kind, rng).description for kind in MIXTURE}
    assert not kinds["clutter"].things
    assert not kinds["stranger"].things
    assert kinds["photo"].things[0].name in ("red mug", "old chair", "lamp")
    assert 1 <= len(kinds["count"].things) <= 6
    views = composer.views(rng, 4)
    assert len({view.description.source for view in views}) == 1
    assert not np.array_equal(views[0].pixels, views[1].pixels)


def test_a_placed_drawing_lies_in_its_box():
    disc = np.zeros((64, 64, 4), np.uint8)
    y, x = np.mgrid[0:64, 0:64]
    disc[(x - 32) ** 2 + (y - 32) ** 2 < 900] = (255, 0, 0, 255)
    picture = Image.new("RGB", (256, 256), (0, 0, 255))
    box = canvas.place(picture, disc, 0.5, 30.0, (0.25, 0.75))
    red = np.argwhere(np.asarray(picture)[..., 0] > 128)
    edges = (
        red[:, 1].min() / 256,
        red[:, 0].min() / 256,
        (red[:, 1].max() + 1) / 256,
        (red[:, 0].max() + 1) / 256,
    )
    assert box == pytest.approx(edges, abs=0.02)
    assert canvas.place(picture, disc, 0.5, 0.0, (1.3, 0.5)) is None


def test_a_shade_keeps_its_colours_name():
    rng = np.random.default_rng(0)
    usual = np.array(list(COLOURS.values()))
    for name in NAMES:
        for _ in range(50):
            distances = np.abs(usual - np.array(shade(name, rng))).sum(1)
            assert NAMES[int(distances.argmin())] == name


def test_strangers_of_all_kinds_differ():
    made = [canvas.stranger(kind, np.random.default_rng(1)) for kind in canvas.STRANGER_KINDS]
    assert all(picture.shape == (256, 256, 3) for picture in made)
    assert len({picture.tobytes() for picture in made}) == len(made)


def test_a_virtual_picture_is_its_class_for_the_classifier():
    rng = np.random.default_rng(0)
    generator_of_weights = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 64, generator=generator_of_weights) * 0.3
    maps = rng.integers(0, 60, (16, 64, 8, 8), dtype=np.uint8)
    encoder = {
        "classifier.weight": weight,
        "classifier.bias": torch.zeros(20),
        "head.output_scale": torch.tensor(0.02),
    }
    virtual = VirtualPictures(maps.astype(np.float32).mean((2, 3)), encoder)
    made, classes = virtual.make(maps, rng)
    assert made.shape == maps.shape
    assert made.dtype == np.uint8
    assert (classes >= 0).mean() > 0.5
    chances = (torch.from_numpy(made.astype(np.float32).mean((2, 3)) * 0.02) @ weight.T).softmax(-1)
    told_chances = chances[np.arange(16), classes][classes >= 0]
    assert told_chances.mean() > 3 / 20
    means, told = virtual.means(torch.from_numpy(maps.astype(np.float32).mean((2, 3)) * 0.02), rng)
    assert means.shape == (16, 64)
    torch.testing.assert_close(told, (means @ weight.T).softmax(-1))
    assert told.max(1).values.mean() > 0.3


def test_made_maps_keep_the_colours_of_their_photographs():
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 120, (6, 64, 4, 4), dtype=np.uint8)
    colours = rng.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    encoder = {
        "classifier.weight": torch.randn(20, 64, generator=torch.Generator().manual_seed(0)),
        "classifier.bias": torch.zeros(20),
        "head.output_scale": torch.tensor(0.02),
    }
    virtual = VirtualPictures(maps.astype(np.float32).mean((2, 3)), encoder)
    made, classes = virtual.make(np.concatenate([maps, colours], 1), np.random.default_rng(1))
    without, same_classes = virtual.make(maps, np.random.default_rng(1))
    assert made.dtype == np.uint8
    assert np.array_equal(made, np.concatenate([without, colours], 1))
    assert np.array_equal(classes, same_classes)


def test_classes_of_pictures_and_windows():
    classes = Classes.of(["cat", "Dog"], 6)
    assert (classes.unknown, classes.nothing) == (4, 5)
    dog, cat = Thing("dog", (0.0, 0.0, 0.5, 0.5)), Thing("cat", (0.55, 0.5, 1.0, 1.0))
    assert classes.of_picture(Description("single", (dog,), "white")) == 1
    assert classes.of_picture(Description("clutter", ())) == 4
    assert classes.of_picture(Description("scene", (dog, cat), "white")) == UNTOLD
    windows = classes.of_windows(Description("scene", (dog, cat), "white"), 4).reshape(4, 4)
    assert windows.tolist() == [[1, 1, 5, 5], [1, 1, 5, 5], [5, 5, 0, 0], [5, 5, 0, 0]]
    small = Description("scene", (Thing("cat", (0.3, 0.3, 0.4, 0.4)),), "white")
    assert classes.of_windows(small, 4).reshape(4, 4)[1, 1] == 0
    shared = Description("scene", (Thing(None, (0.0, 0.0, 0.3, 0.25)),), "white")
    assert classes.of_windows(shared, 4)[:3].tolist() == [4, UNTOLD, 5]
    assert set(classes.of_windows(Description("photo", (cat,)), 4)) == {UNTOLD}
    with pytest.raises(UserError, match="room for 1"):
        Classes.of(["a", "b"], 3)


def test_held_out_pictures_are_read_by_the_data_command(tmp_path, drawn_build):
    shard = write_shard(tmp_path / "photos.tar", "mine", ["red mug", "lamp", None] * 30)
    sources = Sources.open([shard], drawn_build[0])
    count = write_pictures(sources, "test", tmp_path / "held", 3)
    lines = [json.loads(line) for line in (tmp_path / "held" / "test.jsonl").read_text().splitlines()]
    assert len(lines) == count
    assert all((tmp_path / "held" / line["image"]).is_file() for line in lines)
    assert all(("label" in line) != ("declines" in line) for line in lines)
    assert {"clutter", "noise"} <= {line.get("declines") for line in lines}
    assert {"red mug", "lamp"} & {line.get("label") for line in lines}
    assert any(line["image"].startswith("test/named") for line in lines)
    write_pictures(sources, "calibration", tmp_path / "held", 3)
    lines = [json.loads(line) for line in (tmp_path / "held" / "calibration.jsonl").read_text().splitlines()]
    named = [line["source"] for line in lines if line["image"].startswith("calibration/named")]
    assert named
    assert set(named) == {CALIBRATION_VENDOR}
    # Without that vendor, views of trained drawings stand in, of which a model is surer than of what it never saw.
    sources.drawings = [drawing for drawing in sources.drawings if drawing.sheet != CALIBRATION_VENDOR]
    write_pictures(sources, "calibration", tmp_path / "without", 3)
    assert not list((tmp_path / "without" / "calibration").glob("named*"))


def test_a_vendor_that_is_held_out_is_in_one_split(drawn_build):
    drawings = Sources.open([], drawn_build[0]).drawings
    for vendor, split in ((CALIBRATION_VENDOR, "calibration"), (TEST_VENDOR, "test")):
        assert {drawing.split for drawing in drawings if drawing.sheet == vendor} == {split}
    named = {drawing.split for drawing in drawings if drawing.name and drawing.sheet in TRAIN_VENDORS}
    assert named == {"train"}


def test_captions_name_one_thing_with_an_article_and_its_medium():
    lamp = Thing("Lamp", WHOLE)
    assert sentence(Description("photo", (lamp,))) == "a photo of a lamp"
    assert sentence(Description("single", (Thing("owl", WHOLE),))) == "a drawing of an owl"
    assert sentence(Description("photo", (lamp,)), with_medium=False) == "a lamp"
    assert sentence(Description("scene", (DOG, CAT))) == "a cat left of a dog"


def test_captioned_pictures_show_the_training_split_and_are_read_by_the_data_command(tmp_path, drawn_build):
    from microvlm.training.data.caption_data import open_data
    from microvlm.training.data.data_command import command

    labels = [f"thing {number % 12}" if number % 4 else None for number in range(160)]
    shard = write_shard(tmp_path / "photos.tar", "mine", labels)
    arguments = ["--pictures", shard, "--emoji", drawn_build[0], "--count", 60, "--seed", 5]
    for out in ("a", "b"):
        result = CliRunner().invoke(
            command, ["captioned", *map(str, arguments), "-o", str(tmp_path / out)], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
    lines = (tmp_path / "a" / "captions.jsonl").read_text()
    assert lines == (tmp_path / "b" / "captions.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    assert len(records) == 60
    assert {record["declines"] for record in records if "turns" not in record} <= {
        "stranger", "clutter", "unnamed",
    }  # fmt: skip
    trained = {p.label for p in Sources.open([shard], None).photos if p.split == "train"}
    said = {r["turns"][0]["answer"] for r in records if "turns" in r and "photo of" in str(r)}
    assert said <= {f"a photo of a {label}" for label in trained}
    captions = tmp_path / "a" / "captions.jsonl"
    result = CliRunner().invoke(command, ["images", str(captions), "-o", str(tmp_path / "data")])
    assert result.exit_code == 0, result.output
    data = open_data(tmp_path / "data")
    assert data.count("train") + data.count("validation") + data.count("test") == 60


def test_parts_of_a_folder_belong_to_splits():
    assert [split_of_part(part) for part in ("train", "views", "test_views", "calibration")] == [
        "train", "train", "test", "calibration",
    ]  # fmt: skip


def test_texts_are_lines_or_captions(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("A Dog.\n\nTwo cats\n")
    assert read_texts(plain) == ["a dog", "two cats"]
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"captions": ["A dog.", "Two"]}\n')
    assert read_texts(lines) == ["a dog", "two"]
    lines.write_text('{"captions": 3}\n')
    with pytest.raises(UserError, match="no file of sentences"):
        read_texts(lines)


def test_a_shard_that_is_none_and_no_sources_are_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no shard of pictures"):
        Sources.open([tmp_path / "x.tar"], None)
    with pytest.raises(UserError, match="no photographs and no drawings"):
        Sources.open([], None)
    numbered = write_shard(tmp_path / "numbered.tar", "mine", [3, "lamp"])
    with pytest.raises(UserError, match="is no shard of pictures"):
        Sources.open([numbered], None)
