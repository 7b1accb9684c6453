"""The shipped evaluation set: complete, small, of test emoji only, and readable without torch."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from document_mutations import check_mutations

from microvlm.bench.evalset_reader import load_evalset, read_drawing
from microvlm.bench.memory import fact_sets
from microvlm.bench.memory.memoryset_reader import load_memoryset
from microvlm.errors import UserError
from microvlm.training.emoji.data.emoji import read_test_emoji
from microvlm.training.emoji.data.evalset import choose_images
from microvlm.training.emoji.data.scenes import KINDS, pair_is_held_out, read_scene_objects

EVALSET = load_evalset()


def test_every_file_is_there_and_none_is_left_over():
    listed = {i.file for i in EVALSET.images} | {s.file for s in EVALSET.scenes}
    present = {str(p.relative_to(EVALSET.folder)) for p in EVALSET.folder.rglob("*.png")}
    assert listed == present
    assert {f for e in EVALSET.episodes for f in e.files} <= {i.file for i in EVALSET.images}


def test_the_set_is_at_most_two_megabytes():
    assert sum(p.stat().st_size for p in EVALSET.folder.rglob("*") if p.is_file()) <= 2_000_000


def test_the_set_has_its_minimum_size():
    assert len(EVALSET.images) >= 200
    assert len({s.file for s in EVALSET.scenes if s.twin}) >= 80
    assert {s.kind for s in EVALSET.scenes} == set(KINDS)
    lengths = [len(e.files) for e in EVALSET.episodes]
    assert lengths.count(2) >= 20
    assert max(lengths) == 20


def test_images_are_the_test_emoji_with_the_smallest_hashes():
    ranked = sorted(read_test_emoji(), key=lambda row: hashlib.sha256(row[0].encode()).digest())
    assert [(i.hexcode, i.caption) for i in EVALSET.images] == ranked[: len(EVALSET.images)]
    assert choose_images(3) == ranked[:3]


def test_no_scene_shows_a_pair_that_training_composes():
    hexcodes = {caption: hexcode for hexcode, caption in read_scene_objects()}
    pairs = {p for s in EVALSET.scenes for p in combinations(s.objects, 2)}
    assert len(pairs) >= 40
    assert all(pair_is_held_out(hexcodes[a], hexcodes[b]) for a, b in pairs)


def test_every_twin_has_the_same_question_and_another_answer():
    answers = {(s.file, s.question): s.answer for s in EVALSET.scenes}
    with_twin = [s for s in EVALSET.scenes if s.twin]
    assert {s.kind for s in with_twin} == {"what", "where"}
    for scene in with_twin:
        assert answers[scene.twin, scene.question] != scene.answer
        assert not np.array_equal(EVALSET.pixels(scene.file), EVALSET.pixels(scene.twin))


def test_episode_answers_are_the_captions_of_the_images_shown():
    captions = {i.file: i.caption for i in EVALSET.images}
    for episode in EVALSET.episodes:
        twin = EVALSET.episodes[episode.twin]
        assert sorted(twin.files) == sorted(episode.files)
        for question, twin_question in zip(episode.questions, twin.questions, strict=True):
            assert question.answer == captions[episode.files[question.step]] != twin_question.answer
            assert question.distance == len(episode.files) - 1 - question.step


def test_pixels_are_96_square_rgb_with_a_white_border_around_a_drawing():
    for image in EVALSET.images:
        pixels = EVALSET.pixels(image.file)
        assert pixels.shape == (96, 96, 3)
        assert pixels.dtype == np.uint8
        assert (pixels[0] == 255).all()
        assert pixels.min() < 240


def test_the_artwork_is_attributed_beside_the_files():
    text = (EVALSET.folder / "README.md").read_text()
    for word in ("EmojiTwo", "CC BY 4.0", "creativecommons.org/licenses/by/4.0", "Changes made"):
        assert word in text


def test_the_reader_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from microvlm.bench.evalset_reader import load_evalset; print(len(load_evalset().images))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout.strip() == str(len(EVALSET.images)), process.stderr


def test_a_folder_that_is_no_evaluation_set_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no evalset\.json"):
        load_evalset(tmp_path)
    (tmp_path / "evalset.json").write_text("{")
    with pytest.raises(UserError, match=r"evalset\.json is not valid JSON"):
        load_evalset(tmp_path)
    (tmp_path / "evalset.json").write_text(
        json.dumps({"images": [{"file": "x"}], "scenes": [], "episodes": []})
    )
    with pytest.raises(UserError, match=r"evalset\.json: 'images\[0\]\.caption' is missing"):
        load_evalset(tmp_path)


def test_every_changed_evaluation_set_is_a_set_or_one_sentence(tmp_path):
    document = json.loads((EVALSET.folder / "evalset.json").read_text())
    document = {key: rows[:2] for key, rows in document.items()}

    def read(content):
        (tmp_path / "evalset.json").write_bytes(content)
        evalset = load_evalset(tmp_path)
        files = [row.file for row in (*evalset.images, *evalset.scenes)]
        files += [file for episode in evalset.episodes for file in episode.files]
        assert all(evalset.path(file).resolve().is_relative_to(tmp_path.resolve()) for file in files)

    assert check_mutations(document, read) > 300


def test_every_changed_set_of_objects_is_a_set_or_one_sentence(tmp_path):
    document = json.loads((Path(fact_sets.__file__).parents[1] / "memoryset" / "memoryset.json").read_text())
    document["objects"] = document["objects"][:2]

    def read(content):
        (tmp_path / "memoryset.json").write_bytes(content)
        for row in load_memoryset(tmp_path).objects:
            assert (tmp_path / row.file).resolve().is_relative_to(tmp_path.resolve())

    assert check_mutations(document, read) > 50


def test_an_image_that_is_none_or_too_large_is_one_sentence(tmp_path):
    for name, content in (
        ("a.png", b"x"),
        ("b.png", b""),
        ("c.png", png(5000, 5000)),
        ("d.png", png(2**31 - 1, 2**31 - 1)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_drawing(tmp_path / name)
    with pytest.raises(UserError, match="is a folder"):
        read_drawing(tmp_path)


def png(width, height):
    """The head of a PNG file of this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + struct.pack(">I", 0)
        + b"IDAT"
    )


def test_a_truncated_image_is_named(tmp_path):
    file = EVALSET.images[0].file
    (tmp_path / file).parent.mkdir()
    shutil.copy(EVALSET.folder / "evalset.json", tmp_path)
    (tmp_path / file).write_bytes(EVALSET.path(file).read_bytes()[:500])
    with pytest.raises(UserError, match=file):
        load_evalset(tmp_path).pixels(file)
