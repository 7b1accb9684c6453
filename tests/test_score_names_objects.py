"""Names of labelled pictures and objects of captions: counts by hand, from data with labels, synonyms and parents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from captioned_sources import build, picture, write_lines, write_pictures, write_tar
from drawn_emoji import run
from test_score_captions import refuse, score

from microvlm.bench.scores.caption_tables import report
from microvlm.bench.stats import wilson
from microvlm.errors import UserError
from microvlm.training.data.annotations import Annotations, NamedObject, Parent, find_annotations
from microvlm.training.data.caption_data import Turn, open_data
from microvlm.training.scoring.caption_baselines import object_words, template_caption, writer_template
from microvlm.training.scoring.held_out import NamedPicture, Picture, read_held_out
from microvlm.training.scoring.naming_scores import naming_document, naming_measures, outcome
from microvlm.training.scoring.object_scores import annotated, object_measures
from microvlm.training.scoring.object_words import CATEGORIES, objects_in
from microvlm.training.scoring.text_measures import mean_of

DOG = Annotations(
    label="pug",
    wnid="n02110958",
    synonyms=("pug", "pug-dog"),
    parents=(Parent("toy dog", 10), Parent("dog", 11)),
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("pug", "label"),
        ("This is a Pug.", "label"),
        ("it's the pug", "label"),
        ("pug dog", "synonym"),  # a hyphen ends a word, as a blank does
        ("a pug-dog", "synonym"),
        ("a toy dog", "parent"),
        ("dog", "wrong"),
        ("pugs", "wrong"),
        ("I don't know what this is.", "declined"),
        ("a pug or a boxer?", "declined"),
        ("", "declined"),
        ("...", "wrong"),
    ],
)
def test_an_answer_names_the_label_a_synonym_a_narrow_parent_or_something_wrong(answer, expected):
    assert outcome(answer, DOG) == expected


def test_naming_rows_are_counts_with_wilsons_intervals_and_declining_is_a_row_of_its_own():
    answers = ["pug", "a pug-dog", "toy dog", "dog", "I do not know", "tulip"]
    pictures = [NamedPicture(str(number), b"", DOG) for number in range(6)]
    document = naming_document(pictures, answers, "what is this?")
    rows = document["rows"]
    counts = {name: row["count"] for name, row in rows.items()}
    assert counts == {
        **{"label": 1, "synonym": 1, "parent": 1, "wrong": 2, "declined": 1},
        **{"right": 2, "right_or_parent": 3},
    }
    assert (rows["right"]["low"], rows["right"]["high"]) == wilson(2, 6)
    assert rows["right_or_parent"]["value"] == 0.5
    assert document["classes"] == 1
    assert [row["answer"] for row in document["wrong_answers"]] == ["dog", "tulip"]
    measures = naming_measures(pictures, answers)
    assert measures["naming"].interval().value == 2 / 6
    assert measures["naming_or_parent"].interval().value == 3 / 6
    assert measures["naming_wrong"].interval().value == 2 / 6


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two men and a woman ride bikes past a double decker", {"person", "bicycle", "bus"}),
        ("a hot dog on a plate", {"hot dog"}),
        ("a dog beside train tracks", {"dog"}),
        ("a baby elephant", {"elephant"}),
        ("a baby in a high chair", {"person", "chair"}),
        ("an orange and white cat", {"cat"}),
        ("she peels an orange", {"orange"}),
        ("oranges in a bowl", {"orange", "bowl"}),
        ("a teddy bear with a cell phone", {"teddy bear", "cell phone"}),
        ("knives, geese, skis and scissors", {"knife", "bird", "skis", "scissors"}),
        ("nothing of the kind", set()),
    ],
)
def test_words_of_captions_are_categories_as_people_read_them(text, objects):
    assert objects_in(text) == objects


def test_there_are_eighty_categories_and_each_is_named_by_its_own_name():
    assert len(set(CATEGORIES)) == len(CATEGORIES) == 80
    assert [name for name in CATEGORIES if objects_in(f"the {name}") != {name}] == []


def test_chair_and_recall_are_the_shares_counted_by_hand():
    pictures = [
        # There: dog, frisbee (annotated), person (a caption says so).
        Picture("a", b"", ("a man throws a disc", "a dog runs"), ("dog", "frisbee")),
        # There: cat alone.
        Picture("b", b"", ("a sleeping animal",), ("cat", "hat")),
        Picture("c", b"", ("a bus",), ("bus",)),
    ]
    answers = ["a dog and a puppy with a kite", "a cat on a couch next to a vase", "something red"]
    values = {name: m.interval().value for name, m in object_measures(answers, pictures).items()}
    # Named: dog, kite; cat, couch, vase; nothing. Not there: kite; couch, vase.
    assert values["chair_i"] == 3 / 5
    assert values["chair_s"] == 2 / 3
    assert values["object_recall"] == 2 / 5
    # People mention person and dog; nothing; bus.
    assert values["mentioned_recall"] == 1 / 3


def test_captions_that_name_nothing_have_no_wrong_object_and_pictures_without_categories_are_left_out():
    pictures = [Picture("a", b"", ("a hat",), ("hat",)), Picture("b", b"", ("a cat",), ("cat",))]
    assert annotated(pictures) == [1]
    measures = object_measures(["nice"], pictures[1:])
    assert measures["chair_i"].interval() == (0.0, 0.0, 0.0)
    assert measures["object_recall"].interval() == (0.0, 0.0, 0.0)


def test_a_paired_difference_is_the_same_every_time_and_pairs_items():
    ours, theirs = mean_of([1, 1, 0, 1, 0, 1]), mean_of([1, 0, 0, 1, 0, 0])
    first, second = ours.minus(theirs), ours.minus(theirs)
    assert first == second
    assert first.value == 2 / 6
    assert first.low >= 0  # no item is worse, so no resample can be
    assert ours.minus(ours) == (0.0, 0.0, 0.0)


def test_annotations_are_taken_where_they_have_the_schemas_types_and_left_where_they_mean_something_else():
    row = {
        "label": "dog",
        "wnid": "n02084071",
        "synonyms": ["hound"],
        "parents": [{"name": "animal", "classes": 3}],
        "objects": [{"name": "dog", "bbox": [1, 2.5, 3, 4]}, {"name": "ball"}],
        "other": 1,
    }
    boxed = NamedObject("dog", (1.0, 2.5, 3.0, 4.0))
    expected = Annotations(
        "dog", "n02084071", ("hound",), (Parent("animal", 3),), (boxed, NamedObject("ball"))
    )
    assert find_annotations(row) == expected
    foreign = {"label": 3, "wnid": "dog", "synonyms": "hound", "objects": {"bbox": [[1]]}, "parents": None}
    assert find_annotations(foreign) is None
    assert find_annotations({"label": None, "caption": "a dog"}) is None


def entry(number: int, **known: object) -> list[tuple[str, bytes]]:
    record = json.dumps({"key": f"k{number}", **known}).encode()
    return [(f"{number:05d}.jpg", picture(number, kind="JPEG")), (f"{number:05d}.json", record)]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A data folder of shards: four labelled pictures, one of them twice a class, and one captioned with objects."""
    root = tmp_path_factory.mktemp("labelled")
    objects = [{"name": "dog", "bbox": [0, 0, 1, 1]}, {"name": "person"}]
    members = [
        *entry(0, label="pug", wnid="n00000000"),
        *entry(1, label="lapdog", wnid="n00000090"),
        *entry(2, label="cat", wnid="n00000180"),
        *entry(3, label="pug", wnid="n00000000"),
        *entry(4, captions=["a man with a dog", "a dog"], objects=objects),
    ]
    write_tar(root / "photos.tar", members)
    build(root / "photos.tar", "-o", root / "data", "--validation", "0", "--test", "0.9")
    return root / "data"


def wordnet(folder: Path) -> Path:
    """Five concepts: pug and lapdog are dogs, dog and cat animals. Offsets count bytes, as in WordNet's files."""
    rows: dict[str, tuple[list[str], list[str]]] = {
        "pug": (["pug", "pug-dog"], ["dog"]),
        "lapdog": (["lapdog"], ["dog"]),
        "cat": (["cat", "true_cat"], ["animal"]),
        "dog": (["dog", "Canis_familiaris"], ["animal"]),
        "animal": (["animal"], []),
    }
    offsets = {name: 90 * number for number, name in enumerate(rows)}
    lines = []
    for name, (words, above) in rows.items():
        named = " ".join(f"{word} 0" for word in words)
        pointers = "".join(f" @ {offsets[higher]:08d} n 0000" for higher in above)
        line = f"{offsets[name]:08d} 05 n {len(words):02x} {named} {len(above):03d}{pointers} | a {name}"
        lines.append(line.ljust(89))
    folder.mkdir()
    (folder / "data.noun").write_text("\n".join(lines) + "\n")
    return folder


def test_labels_and_objects_of_shards_survive_in_the_data_folder_and_in_its_own_shards(labelled, tmp_path):
    found = read_held_out(open_data(labelled), "all")
    assert sorted((p.annotations.label, p.annotations.wnid) for p in found.named) == [
        ("cat", "n00000180"),
        ("lapdog", "n00000090"),
        ("pug", "n00000000"),
        ("pug", "n00000000"),
    ]
    (scene,) = [p for p in found.pictures if p.objects]
    assert scene.objects == ("dog", "person")
    assert scene.captions == ("a man with a dog", "a dog")
    shards = sorted(labelled.glob("*.tar"))
    build(*shards, "-o", tmp_path / "again", "--validation", "0", "--test", "0.9")
    again = read_held_out(open_data(tmp_path / "again"), "all")
    assert sorted(p.annotations.label for p in again.named) == ["cat", "lapdog", "pug", "pug"]


def test_folders_of_labels_are_labels(tmp_path):
    for name in ("red_fox", "hen"):
        write_pictures(tmp_path / "kinds" / name, 2, len(name))
    build(tmp_path / "kinds", "-o", tmp_path / "data", "--validation", "0", "--test", "0")
    data = open_data(tmp_path / "data")
    samples = [data.sample("train", number) for number in range(4)]
    assert [s.annotations.label for s in samples] == ["hen", "hen", "red fox", "red fox"]
    assert samples[2].turns == (Turn("red fox"),)


def test_names_come_from_wordnet_once_and_scores_read_them_from_the_folder(labelled, tmp_path):
    result = run("names", labelled, "--wordnet", wordnet(tmp_path / "wordnet"), "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["classes"], summary["samples"]) == (3, 4)
    found = read_held_out(open_data(labelled), "all")
    by_label = {picture.annotations.label: picture.annotations for picture in found.named}
    assert by_label["pug"].synonyms == ("pug", "pug-dog")
    assert by_label["pug"].parents == (
        Parent("dog", 2),
        Parent("Canis familiaris", 2),
        Parent("animal", 3),
    )
    assert by_label["cat"].parents == (Parent("animal", 3),)
    assert outcome("a dog", by_label["lapdog"]) == "parent"
    (labelled / "names.json").write_text("{}")
    with pytest.raises(UserError, match=r"names.json.*write it again with microvlm-data names"):
        read_held_out(open_data(labelled), "all")
    (labelled / "names.json").unlink()


def test_names_without_wordnet_or_without_classes_are_refused(labelled, mixed_free, tmp_path):
    result = run("names", labelled, "--wordnet", tmp_path)
    assert result.exit_code == 2
    assert "holds no data.noun" in result.stderr
    (tmp_path / "data.noun").write_text("  1 This software\n" * 40)
    result = run("names", labelled, "--wordnet", tmp_path)
    assert result.exit_code == 2
    assert "it is not WordNet 3.0" in result.stderr
    result = run("names", mixed_free, "--wordnet", tmp_path)
    assert result.exit_code == 2
    assert "has no sample with a wnid" in result.stderr
    assert not (labelled / "names.json").exists()


@pytest.fixture(scope="module")
def mixed_free(tmp_path_factory) -> Path:
    """A data folder without any annotation."""
    root = tmp_path_factory.mktemp("plain")
    names = write_pictures(root, 2)
    write_lines(root / "captions.jsonl", [{"image": name, "caption": name} for name in names])
    build(root / "captions.jsonl", "-o", root / "data", "--validation", "0", "--test", "0.9")
    return root / "data"


def test_microvlm_score_names_and_counts_objects_beside_a_template(labelled, speaking_checkpoint, tmp_path):
    status, stdout, stderr = score(
        *(speaking_checkpoint, "--data", labelled, "--split", "all", "--template"),
        *("--only", "naming", "--only", "captions", "--against", "nano", "-o", tmp_path / "s.json"),
    )
    assert status == 0, stderr
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["naming"]["pictures"] == 4
    assert (
        sum(document["naming"]["rows"][name]["count"] for name in ("right_or_parent", "wrong", "declined"))
        == 4
    )
    assert "tokens" not in document
    assert "questions" not in document
    (baseline,) = document["caption_baselines"]
    assert baseline["objects"]["pictures"] == document["objects"]["pictures"] == 1
    assert baseline["objects"]["object_recall"]["value"] == 1.0
    assert baseline["objects"]["chair_s"]["value"] == 0.0
    assert {"naming", "chair_i", "cider_d"} <= set(document["against"]["differences"])
    for part in ("annotated objects in a template", "declined", "undecided", "CHAIR_i", "all splits"):
        assert part in stdout


def test_a_verdict_is_undecided_exactly_where_the_interval_contains_0():
    import msgspec

    from microvlm.bench.scores.caption_records import CaptionReport

    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    document = {
        "model": "a",
        "backend": "torch",
        "data": {"name": "d", "split": "test", "samples": 9, "available": 9},
        "provenance": {"date_utc": "", "cpu": "", "versions": {}},
        "captions": {
            **{"pictures": 9, "references": 9, "different": 9},
            **dict.fromkeys(("exact_match", "word_f1", "bleu4"), share),
        },
        "against": {
            "model": "b",
            "differences": {
                "cider_d": {"value": 0.1, "low": 0.01, "high": 0.2},
                "bleu4": {"value": 0.1, "low": 0.0, "high": 0.2},
                "word_f1": {"value": -0.1, "low": -0.2, "high": -0.01},
            },
        },
    }
    rendered = report(msgspec.convert(document, CaptionReport))
    (rows,) = [table.rows for table in rendered.tables if table.name == "differences"]
    assert [row[-1] for row in rows] == ["verdict", "decided", "undecided", "decided"]


def test_words_of_a_detector_come_from_a_file_or_from_annotations(tmp_path):
    pictures = [
        Picture("a", b"", ("x",), ("dog", "dog", "apple")),
        Picture("b", b"", ("y",)),
    ]
    assert object_words(None, pictures) == [["dog", "apple"], []]
    assert [template_caption(row) for row in object_words(None, pictures)] == [
        "a photo of a dog and an apple",
        "",
    ]
    assert template_caption(["dog", "owl", "cup"]) == "a photo of a dog, an owl and a cup"
    lines = write_lines(tmp_path / "w.jsonl", [{"key": "b", "words": ["cup"]}, {"key": "a", "words": []}])
    assert object_words(lines, pictures) == [[], ["cup"]]
    write_lines(lines, [{"key": "b", "words": ["cup"]}])
    with pytest.raises(UserError, match="no words for the picture a"):
        object_words(lines, pictures)
    with pytest.raises(UserError, match="--words FILE"):
        object_words(None, pictures[1:])


def test_the_language_models_examples_are_turns_of_its_own_template():
    from microvlm.config import PromptConfig

    prompt = PromptConfig(
        template="<u><image>{prompt}</u><a>", image_token="<image>", eos_token="</a>", pad_token="<pad>"
    )
    template = writer_template(prompt)
    assert template.count("<image>") == template.count("{prompt}") == 1
    assert template.startswith("<u>dog, person, frisbee</u><a>A dog jumps")
    assert template.endswith("<u><image>{prompt}</u><a>")
    assert template.count("</a>\n") == 4


def test_a_part_that_is_left_out_has_no_baseline_and_a_question_reaches_the_model(
    labelled, speaking_checkpoint, tmp_path
):
    asked = "name this object"
    status, _, stderr = score(
        *(speaking_checkpoint, "--data", labelled, "--split", "all", "--only", "naming", "--template"),
        *("--question", asked, "-o", tmp_path / "s.json"),
    )
    assert status == 0, stderr
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["naming"]["question"] == asked
    assert "captions" not in document
    assert "caption_baselines" not in document
    assert "Invalid value for '--only'" in refuse(
        speaking_checkpoint, "--data", labelled, "--only", "colours"
    )
