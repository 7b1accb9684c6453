"""The fixed lists and hashes that decide, before any training, which emoji and vendors are trained or tested on."""

import hashlib
import json
from importlib import resources

from microvlm.training.emoji.data.drawing_sources import SOURCES, STRESS_VENDOR, TEST_VENDOR, TRAIN_VENDORS
from microvlm.training.emoji.data.emoji import SEEN_MINIMUM, hash_percent, read_test_emoji, slug, split_emoji
from microvlm.training.emoji.data.scenes import read_scene_objects


def test_the_list_of_test_emoji_follows_the_hash():
    rows = read_test_emoji()
    assert len(rows) >= SEEN_MINIMUM
    percents = [int(hashlib.sha256(hexcode.encode()).hexdigest(), 16) % 100 for hexcode, _ in rows]
    assert max(percents) < 50
    # One step of five lower would leave too few: 50 is the smallest threshold.
    assert sum(p < 45 for p in percents) < SEEN_MINIMUM
    assert [hash_percent(hexcode.lower()) for hexcode, _ in rows] == percents


def test_captions_are_unique_lower_case_ascii():
    captions = [caption for _, caption in read_test_emoji()]
    assert len(set(captions)) == len(captions)
    assert all(c.isascii() and c == c.lower() == c.strip() and c for c in captions)


def test_the_test_and_stress_vendors_are_never_trained_on():
    assert TEST_VENDOR not in TRAIN_VENDORS
    assert STRESS_VENDOR not in TRAIN_VENDORS
    assert {s.vendor for s in SOURCES} == {*TRAIN_VENDORS, TEST_VENDOR, STRESS_VENDOR}
    assert all("-SA-" not in s.licence for s in SOURCES if s.use == "train")


def test_scene_objects_are_48_of_the_test_emoji():
    objects = read_scene_objects()
    assert len(objects) == 48
    assert set(objects) <= set(read_test_emoji())


def test_a_split_takes_the_smallest_threshold_that_is_large_enough():
    hexcodes = [f"{n:X}" for n in range(0x1F000, 0x1F000 + 2000)]
    splits = split_emoji(hexcodes, [n % 4 > 0 for n in range(2000)])
    assert splits[::4] == ["extra"] * 500
    seen_hashes = [hash_percent(c) for c, s in zip(hexcodes, splits, strict=True) if s == "seen"]
    held_out_hashes = [hash_percent(c) for c, s in zip(hexcodes, splits, strict=True) if s == "held_out"]
    assert max(seen_hashes) < min(held_out_hashes)
    step = max(seen_hashes) // 5 * 5
    assert len(seen_hashes) >= SEEN_MINIMUM > sum(p < step for p in seen_hashes)


def test_a_slug_is_the_name_that_icon_packages_use():
    assert slug("Woman\u2019s Boot") == "womans-boot"
    assert slug("piñata") == "pinata"
    assert slug("A button (blood type)") == "a-button-blood-type"


def test_names_given_by_hand_belong_to_known_vendors():
    names = json.loads(resources.files("microvlm.training.emoji.data").joinpath("names.json").read_text())
    assert set(names) <= {s.vendor for s in SOURCES}
    # The insect is drawn by neither: both sets mean the game.
    assert names["emojione"]["cricket"] is None
    assert names["noto-v1"]["cricket"] is None
