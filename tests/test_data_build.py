"""The whole build, on a tiny set of packages that the test draws: no npm, no network."""

import json
import os
import stat

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("resvg_py")

from document_mutations import check_mutations  # noqa: E402
from drawn_emoji import ROWS, colour, run, write_packages  # noqa: E402

from microvlm.errors import UserError  # noqa: E402
from microvlm.training.emoji.data import baselines, evalset  # noqa: E402
from microvlm.training.emoji.data.drawing_sources import SOURCES, DataError, IconSet  # noqa: E402
from microvlm.training.emoji.data.emoji import load_emoji, open_pixels  # noqa: E402
from microvlm.training.emoji.data.scene_drawing import compose_scenes  # noqa: E402
from microvlm.training.emoji.data.scenes import (  # noqa: E402
    GROUNDS,
    Placed,
    Scene,
    read_scene_objects,
)
from microvlm.training.emoji.data.views import augment_emoji, plain_emoji  # noqa: E402


@pytest.fixture(scope="module")
def packages(drawn_packages):
    return drawn_packages


@pytest.fixture(scope="module")
def emoji_build(drawn_build):
    return drawn_build


@pytest.fixture(scope="module")
def emoji(emoji_build):
    return load_emoji(emoji_build[0])


def assert_refused(result, *words):
    """Status 2 and one sentence on stderr."""
    assert result.exit_code == 2, (result.stdout, result.stderr)
    message = result.stderr.strip()
    assert message.startswith("Error: ")
    assert len(message.splitlines()) == 1
    assert "Traceback" not in message
    for word in words:
        assert word in message


def test_flags_components_and_gender_variants_have_no_caption(emoji_build, emoji):
    assert emoji.hexcodes == [code for code, _ in ROWS]
    assert emoji_build[1]["emoji"] == len(ROWS)


def test_a_drawing_is_found_by_character_label_unicode_name_or_joined_words(emoji):
    last = emoji.index("1F6AC")
    assert emoji.present("noto-v1")[last]
    assert not emoji.present("fxemoji")[last]
    assert emoji.present("fxemoji")[emoji.index("1F6AA")]
    assert emoji.core.all()


def test_a_missing_drawing_is_all_zero_and_a_mirrored_alias_is_mirrored(emoji):
    last = emoji.index("1F6AC")
    assert not emoji.images("fxemoji")[last].any()
    alpha = emoji.images("twemoji")[last][..., 3]
    assert not alpha[:, :48].any()
    assert (alpha[:, 48:] == 255).all()


def test_a_drawing_that_is_not_square_is_centred_and_keeps_its_shape(emoji):
    for code, wide in (("1F6AA", True), ("1F6AB", False)):
        alpha = emoji.images("noto")[emoji.index(code)][..., 3]
        alpha = alpha if wide else alpha.T
        assert (alpha[24:72] == 255).all()
        assert not alpha[:23].any()
        assert not alpha[73:].any()


def test_other_sizes_cover_the_training_vendors_only(packages, tmp_path):
    out = tmp_path / "emoji"
    result = run("emoji", "-o", out, "--packages", packages, "--size", "16")
    assert result.exit_code == 0
    drawn_vendors = {p.stem for p in (out / "rgba16").glob("*.npy")}
    assert drawn_vendors == {s.vendor for s in SOURCES if s.use == "train"}
    with pytest.raises(DataError, match="no 96 px images of noto"):
        load_emoji(out).images("noto")
    assert [p.name for p in tmp_path.iterdir()] == ["emoji"]
    # Adding a size to a finished folder keeps what is there.
    assert run("emoji", "-o", out, "--packages", packages, "--size", "20", "--vendor", "noto").exit_code == 0
    assert load_emoji(out).images("noto", 20).shape == (len(ROWS), 20, 20, 4)
    assert load_emoji(out).images("noto", 16).shape == (len(ROWS), 16, 16, 4)


def test_the_plain_view_is_the_drawing_on_white(emoji):
    image = plain_emoji(torch.from_numpy(np.array(emoji.images("noto")[:2])))
    assert image.shape == (2, 3, 96, 96)
    assert (image[:, :, 0] == 1).all()
    assert torch.allclose(image[1, :, 48, 48] * 255, torch.tensor(colour(1)).float(), atol=1)


def test_augmentation_is_fixed_by_its_generator_and_stays_in_range(emoji):
    rgba = torch.from_numpy(np.array(emoji.images("noto")[:40]))
    first, again, other_image = (augment_emoji(rgba, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other_image)
    assert first.shape == (40, 3, 96, 96)
    assert first.min() >= 0
    assert first.max() <= 1
    assert augment_emoji(rgba, torch.Generator().manual_seed(0), size=48).shape == (40, 3, 48, 48)


def test_augmentation_mirrors_only_on_request(emoji):
    half = torch.from_numpy(np.array(emoji.images("twemoji")[[emoji.index("1F6AC")] * 24]))
    darker_right = [
        (
            augment_emoji(half, torch.Generator().manual_seed(0), 0.0, flip=flip)[..., :40].mean((1, 2, 3))
            > 0.9
        )
        for flip in (False, True)
    ]
    assert darker_right[0].all()
    assert 0 < int(darker_right[1].sum()) < 24


def test_a_composed_scene_shows_each_object_in_its_place_and_its_twin_exchanges_them(emoji):
    scene = Scene(5, (Placed(3, 0.25, 0.5, 0.4), Placed(30, 0.75, 0.5, 0.4)), "left-right")
    images = compose_scenes([scene, scene.swapped()], emoji, ["emojione", "emojione"])
    points = (images[:, :, 48, [24, 72]] * 255).round()
    first, second = torch.tensor(colour(3)).float(), torch.tensor(colour(30)).float()
    for twin, (left, right) in enumerate([(first, second), (second, first)]):
        assert torch.allclose(points[twin, :, 0], left, atol=1)
        assert torch.allclose(points[twin, :, 1], right, atol=1)
    assert torch.allclose(images[:, :, 2, 2] * 255, torch.tensor(GROUNDS[5][1]).float(), atol=1)


def test_a_varied_scene_is_fixed_by_its_generator(emoji):
    scene = Scene(0, (Placed(3, 0.5, 0.5, 0.4),))
    views = [
        compose_scenes([scene] * 3, emoji, generator=torch.Generator().manual_seed(s), strength=1.0)
        for s in (0, 0, 1)
    ]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_the_class_mean_baseline_names_the_vendor_that_draws_alike_and_only_that(emoji, monkeypatch):
    monkeypatch.setattr(baselines, "read_test_emoji", lambda: list(read_scene_objects()))
    result = baselines.run_baselines(emoji, teacher=False)
    assert result["classes"] == 48
    assert result["pixels_24"]["emojione"] == 1.0
    # Every drawing of the stress vendor is its neighbour's.
    assert result["pixels_24"]["openmoji"] < 0.1


def test_the_evaluation_set_is_written_whole_or_not_at_all(emoji_build, emoji, monkeypatch, tmp_path):
    monkeypatch.setattr(evalset, "choose_images", lambda: list(read_scene_objects()))
    out = tmp_path / "evalset"
    summary = evalset.build_evalset(emoji, out, "0")
    assert summary["images"] == 48
    assert len(list(out.glob("images/*.png"))) == 48
    with pytest.raises(DataError, match="exists"):
        evalset.build_evalset(emoji, out, "0")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evalset, "save_images", fail)
    with pytest.raises(UserError, match="no space is left"):
        evalset.build_evalset(emoji, tmp_path / "second", "0")
    assert [p.name for p in tmp_path.iterdir()] == ["evalset"]


def test_a_folder_without_packages_is_refused(tmp_path):
    assert_refused(run("emoji", "-o", tmp_path / "x", "--packages", tmp_path), "--packages", "node_modules")
    assert not (tmp_path / "x").exists()


def test_a_damaged_package_is_refused_and_nothing_is_left(tmp_path):
    root = tmp_path / "node_modules"
    write_packages(root)
    broken_file = root / "@iconify-json/twemoji/icons.json"
    broken_file.write_text(broken_file.read_text()[:100])
    assert_refused(run("emoji", "-o", tmp_path / "x", "--packages", root), "damaged", "twemoji")
    broken_file.unlink()
    assert_refused(run("emoji", "-o", tmp_path / "x", "--packages", root), "missing", "twemoji")
    assert [p.name for p in tmp_path.iterdir()] == ["node_modules"]


def test_every_changed_table_of_emoji_is_a_table_or_one_sentence(emoji_build, tmp_path):
    document = json.loads((emoji_build[0] / "emoji.json").read_text())
    count = 9
    document["emoji"] = document["emoji"][:count]
    document["present"] = {vendor: drawn[:count] for vendor, drawn in document["present"].items()}

    def read(content):
        (tmp_path / "emoji.json").write_bytes(content)
        emoji = load_emoji(tmp_path)
        assert len(emoji.is_seen) == len(emoji.held_out) == len(emoji.captions) == count
        assert emoji.present("noto").shape == (count,)

    assert check_mutations(document, read) > 300


def test_every_changed_package_is_a_package_or_one_sentence(tmp_path):
    root = tmp_path / "node_modules"
    write_packages(root)
    source = next(source for source in SOURCES if source.vendor == "twemoji")
    path = root / source.package / "icons.json"
    document = json.loads(path.read_text())
    icons = list(document["icons"])[:2]
    document["icons"] = {name: document["icons"][name] for name in icons}
    document["aliases"] = {
        "other": {"parent": icons[0], "rotate": 1, "hFlip": True},
        "third": {"parent": "other"},
    }

    def read(content):
        path.write_bytes(content)
        drawings = IconSet(source, root)
        for name in [*drawings.icons, *drawings.aliases]:
            drawings.svg(name)

    assert check_mutations(document, read) > 100
    document["aliases"]["other"]["parent"] = "third"
    with pytest.raises(DataError, match="'other' is an alias of itself"):
        read(json.dumps(document).encode())


def test_drawings_of_another_size_or_kind_are_refused(emoji_build, tmp_path):
    emoji = load_emoji(emoji_build[0])
    count = len(emoji.captions)
    path = tmp_path / "noto.npy"
    for array in (np.zeros((count, 16, 16, 4)), np.zeros((count + 1, 16, 16, 4), np.uint8)):
        np.save(path, array)
        with pytest.raises(DataError, match="does not hold"):
            open_pixels(path, count, 16, "build it again")
    for content in (b"", b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04", b"x" * 200, path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read|does not hold"):
            open_pixels(path, count, 16, "build it again")


def test_a_drawing_that_is_no_svg_is_named(tmp_path):
    root = tmp_path / "node_modules"
    write_packages(root)
    broken_file = root / "@iconify-json/twemoji/icons.json"
    document = json.loads(broken_file.read_text())
    document["icons"]["lion"]["body"] = "<g>"
    broken_file.write_text(json.dumps(document))
    assert_refused(
        run("emoji", "-o", tmp_path / "x", "--packages", root, "--vendor", "twemoji"), "lion", "twemoji"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["node_modules"]


def test_a_place_that_cannot_be_written_is_named(emoji_build, packages, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    result = run("emoji", "-o", file / "x", "--packages", packages, "--size", "16")
    assert_refused(result, str(file / "x"), "cannot be written")
    with monkeypatch.context() as patch:
        patch.setattr(evalset, "choose_images", lambda: list(read_scene_objects()))
        assert_refused(run("evalset", emoji_build[0], "-o", file / "x"), str(file / "x"), "cannot be written")
    monkeypatch.setenv("MICROVLM_CACHE", str(file / "cache"))
    fake_npm(tmp_path / "bin", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert_refused(run("emoji", "-o", tmp_path / "x"), str(file / "cache"), "set MICROVLM_CACHE")


def test_a_foreign_output_folder_is_refused_and_left_alone(packages, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    assert_refused(run("emoji", "-o", tmp_path, "--packages", packages), "is not an emoji folder")
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_folder_that_lacks_a_test_emoji_is_refused(emoji_build, tmp_path):
    assert_refused(run("evalset", emoji_build[0], "-o", tmp_path / "x"), "lacks the emoji")
    assert_refused(run("baselines", emoji_build[0], "--pixels-only"), "lacks the emoji")


@pytest.mark.parametrize("command", [("baselines",), ("evalset", "-o", "x")])
def test_a_folder_that_holds_no_emoji_is_refused(tmp_path, command):
    assert_refused(run(command[0], tmp_path, *command[1:]), "emoji.json")
    (tmp_path / "emoji.json").write_text("[]")
    assert_refused(run(command[0], tmp_path, *command[1:]), "emoji.json: the document must be an object")


def fake_npm(folder, script):
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)


def test_without_npm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_refused(run("emoji", "-o", tmp_path / "x"), "npm was not found", "--packages")


def test_a_failing_npm_gives_one_sentence_and_leaves_no_cache(tmp_path, monkeypatch):
    fake_npm(tmp_path / "bin", "echo 'npm error network unreachable' >&2; exit 1")
    monkeypatch.setenv("MICROVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert_refused(run("emoji", "-o", tmp_path / "x"), "network unreachable")
    assert not any((tmp_path / "cache").iterdir())


def test_npm_installs_pinned_versions_once_and_never_runs_scripts(packages, tmp_path, monkeypatch):
    log = tmp_path / "calls"
    fake_npm(tmp_path / "bin", f'echo "$@" >> {log}; cp -r {packages} node_modules')
    monkeypatch.setenv("MICROVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("a", "b"):
        assert run("emoji", "-o", tmp_path / name, "--size", "16", "--vendor", "noto").exit_code == 0
    calls = log.read_text().splitlines()
    assert len(calls) == 1
    assert "--ignore-scripts" in calls[0].split()
    dependencies = json.loads((tmp_path / "cache/npm/package.json").read_text())["dependencies"]
    assert dependencies["@iconify-json/emojione"] == "1.2.3"
    assert all(version[0].isdigit() for version in dependencies.values())
