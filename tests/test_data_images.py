"""`microvlm-data images`: what is left out and why, splits, resuming, hostile inputs, and what a folder looks like."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
from captioned_sources import (
    build,
    picture,
    refuse,
    write_captions,
    write_lines,
    write_pictures,
    write_tar,
)
from drawn_emoji import run
from PIL import Image

from microvlm.inputs.images import load_square, load_within
from microvlm.training.data.caption_data import SPLITS, open_data
from microvlm.training.data.images import build as build_module
from microvlm.training.data.images import split_choice
from microvlm.training.data.images.split_choice import HashSet
from microvlm.training.data.mixture import Mixture


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def skipped(out) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def hashes(out) -> dict[str, set[str]]:
    data = open_data(out)
    return {s: {span.sha256 for line in data.lines(s) for span in line.images} for s in SPLITS}


def giant_png() -> bytes:
    """A few kilobytes that claim 40,000 x 40,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def test_each_bad_record_is_counted_by_its_reason_and_listed_with_its_line(tmp_path, out):
    write_pictures(tmp_path, 12)
    (tmp_path / "cut.jpg").write_bytes(picture(1, (300, 200), "JPEG")[:-400])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
    (tmp_path / "tiny.png").write_bytes(picture(1, (7, 30)))
    (tmp_path / "bomb.png").write_bytes(giant_png())
    (tmp_path / "folder.png").mkdir()
    good = {"image": "0000.png", "caption": "good"}
    rows = [
        ("", good),
        ("same picture and text again", good),
        ("missing picture", {"image": "gone.png", "caption": "a"}),
        ("damaged picture", {"image": "cut.jpg", "caption": "a"}),
        ("empty file", {"image": "empty.png", "caption": "a"}),
        ("not a picture", {"image": "page.jpg", "caption": "a"}),
        ("picture too small", {"image": "tiny.png", "caption": "a"}),
        ("picture too large", {"image": "bomb.png", "caption": "a"}),
        ("picture cannot be read", {"image": "folder.png", "caption": "a"}),
        ("picture cannot be read", {"image": "a\0b.png", "caption": "a"}),
        ("picture cannot be read", {"image": "n" * 300 + ".png", "caption": "a"}),
        ("no caption", {"image": "0001.png", "caption": " \n"}),
        ("no caption", {"image": "0001.png"}),
        ("caption too long", {"image": "0002.png", "caption": "x" * 1001}),
        ("control characters in a caption", {"image": "0003.png", "caption": "a\x1b[2Jb"}),
        ("caption is not UTF-8", b'{"image": "0004.png", "caption": "\xff\xfe"}'),
        ("damaged record", '{"image": "0004.png", "caption": "\\ud83d"}'),
        ("no picture named", {"caption": "a"}),
        ("a URL, not a file", {"image": "https://a.example/b.jpg", "caption": "a"}),
        ("damaged record", "{"),
        ("damaged record", "[1]"),
        ("damaged record", {"image": {"a": 1}, "caption": "a"}),
        ("damaged record", {"image": "0005.png", "caption": {"a": 1}}),
        ("damaged record", {"image": "0005.png", "turns": [{"answer": "a", "images": [1]}]}),
        ("damaged record", {"image": "0005.png", "turns": [{"answer": "a", "images": []}]}),
        ("damaged record", {"image": "0005.png", "turns": [{"question": "what?"}]}),
        ("damaged record", {"image": "0005.png", "turns": "all"}),
        ("damaged record", {"images": ["0005.png"] * 65, "caption": "a"}),
        ("damaged record", '{"image": "0005.png", "caption": "' + "x" * 1_000_000 + '"}'),
        ("damaged record", "[" * 100_000),
        ("", {"image": "0011.png", "caption": "  good \u0065\u0301 \t end "}),
    ]
    summary = build(write_lines(tmp_path / "list.jsonl", [row for _, row in rows]), "-o", out)
    listed = [(row["place"], row["reason"]) for row in skipped(out)]
    # Duplicates are known when samples are written, which is later.
    assert sorted(listed) == sorted(
        (f"list.jsonl:{n}", reason) for n, (reason, _) in enumerate(rows, 1) if reason
    )
    assert summary["kept"] == 2
    assert sum(summary["skipped"].values()) == len(rows) - 2
    assert "good é end" in list(open_data(out).texts("train"))
    assert str(tmp_path) not in (out / "skipped.jsonl").read_text()


def test_a_bad_row_of_a_csv_is_one_skip(tmp_path, out):
    write_pictures(tmp_path, 4)
    lines = [
        b"image,caption",
        b"0000.png,one",
        b"0001.png",
        b'0001.png,"b\xffd"',
        b"0002.png," + b"x" * 2_000_000,
    ]
    (tmp_path / "a.csv").write_bytes(b"\n".join([*lines, b"0003.png,last", b""]))
    summary = build(tmp_path / "a.csv", "-o", out)
    assert (summary["kept"], summary["skipped"]) == (2, {"damaged record": 2, "caption is not UTF-8": 1})
    assert [row["place"] for row in skipped(out)] == ["a.csv:3", "a.csv:4", "a.csv:5"]


def test_one_bad_caption_of_several_leaves_the_others(tmp_path, out):
    write_pictures(tmp_path, 1)
    row = {"image": "0000.png", "captions": ["good", "", "also good"]}
    assert build(write_lines(tmp_path / "a.jsonl", [row]), "-o", out)["skipped"] == {"no caption": 1}
    assert list(open_data(out).texts("train")) == ["good", "also good"]


def test_large_pictures_are_scaled_upright_and_others_stay_byte_for_byte(tmp_path, out):
    tall = Image.new("RGB", (900, 300), "red")
    tall.paste("blue", (0, 0, 450, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    tall.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    small = picture(3, (512, 100))
    (tmp_path / "small.png").write_bytes(small)
    rows = [{"image": name, "caption": name} for name in ("turned.jpg", "small.png")]
    build(write_lines(tmp_path / "a.jsonl", rows), "-o", out, "--validation", "0", "--test", "0")
    first, second = (open_data(out).sample("train", n).images[0] for n in range(2))
    with Image.open(io.BytesIO(first)) as image:
        assert (image.format, image.size) == ("JPEG", (171, 512))
    pixels = np.asarray(load_within(first, 512).image).astype(int)
    assert pixels[20, 80, 2] > 200 > 100 > pixels[20, 80, 0]
    assert pixels[-20, 80, 0] > 200
    assert second == small


def test_no_picture_is_in_two_splits_and_a_set_that_grows_keeps_its_splits(tmp_path, out):
    path = write_captions(tmp_path, 300)
    build(path, "-o", out, "--validation", ".2", "--test", ".1")
    before = hashes(out)
    assert 30 < len(before["validation"]) < 90
    assert 10 < len(before["test"]) < 55
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    again = [{**row, "caption": "in other words"} for row in rows]
    names = write_pictures(tmp_path / "pictures", 60, 300)
    more = [{"image": f"pictures/{name}", "caption": "new"} for name in names]
    grown = tmp_path / "grown"
    summary = build(
        write_lines(tmp_path / "b.jsonl", [*again, *more, *rows]),
        "-o",
        grown,
        "--validation",
        ".2",
        "--test",
        ".1",
    )
    after = hashes(grown)
    assert summary["repeated_pictures"] == 300
    assert summary["kept"] == 660
    for split in SPLITS:
        assert before[split] <= after[split]
        assert not any(after[split] & after[other] for other in SPLITS if other != split)


@pytest.mark.parametrize("count", [1, 2, 5, 20, 40])
def test_tiny_sets_have_something_to_train_on_and_from_twenty_on_to_validate(tmp_path, count):
    for trial in range(4):
        folder = tmp_path / str(trial)
        names = write_pictures(folder, count, 1000 * trial)
        rows = [{"image": name, "caption": name} for name in names]
        splits = build(write_lines(folder / "a.jsonl", rows), "-o", folder / "out")["splits"]
        assert splits["train"] >= 1
        assert count < 20 or (splits["validation"] >= 1 and splits["test"] >= 1)
        assert sum(splits.values()) == count


def test_a_splits_share_of_zero_is_empty_and_shares_leave_something(tmp_path, out):
    path = write_captions(tmp_path, 60)
    assert build(path, "-o", out, "--validation", "0", "--test", "0")["splits"] == {
        "train": 60,
        "validation": 0,
        "test": 0,
    }
    assert "must be below 1" in refuse(path, "-o", tmp_path / "b", "--validation", ".6", "--test", ".4")


def test_samples_of_several_pictures_never_tear_a_picture_over_two_splits(tmp_path, out):
    write_pictures(tmp_path, 80)
    rng = np.random.default_rng(1)
    rows = []
    for n in range(200):
        pictures = [f"{k:04d}.png" for k in rng.choice(80, 1 + n % 3, replace=False)]
        rows.append({"images": pictures, "caption": f"row {n}"})
    summary = build(write_lines(tmp_path / "a.jsonl", rows), "-o", out, "--validation", ".2", "--test", ".2")
    assert summary["skipped"]["pictures already in different splits"] > 3
    found = hashes(out)
    assert all(found.values())
    assert not found["train"] & found["validation"] | found["train"] & found["test"]


def test_max_images_stops_there(tmp_path, out):
    summary = build(write_captions(tmp_path, 30), "-o", out, "--max-images", "12")
    assert summary["kept"] == 12


def test_a_finished_folder_is_complete_and_another_is_not_written_over(tmp_path, out):
    path = write_captions(tmp_path, 5)
    first = build(path, "-o", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    again = build(path, "-o", out)
    assert again == {**first, "complete_before": True}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert "of other sources or options" in refuse(path, "-o", out, "--max-side", "64")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert "is no data folder" in refuse(path, "-o", tmp_path / "full")
    (tmp_path / "emptied").mkdir()
    assert build(path, "-o", tmp_path / "emptied")["kept"] == 5


def test_a_run_that_is_cut_off_goes_on_and_ends_with_the_bytes_of_an_unbroken_one(tmp_path, out, monkeypatch):
    path = write_captions(tmp_path, 90)
    lines = path.read_text().splitlines()
    lines[70:70] = ['{"image": "gone.png", "caption": "a"}', lines[3]]
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(build_module, "SAVE_EVERY", 20)
    monkeypatch.setattr(build_module, "FIRST_SAMPLES", 30)
    monkeypatch.setattr(split_choice, "_MERGE_AT", 7)
    whole = tmp_path / "whole"
    build(path, "-o", whole)
    write = build_module._Builder._write
    for stop in (10, 45, 73):
        kept = 0

        def fail(self, checked, stop=stop):
            if self.kept == stop:
                raise KeyboardInterrupt
            write(self, checked)

        monkeypatch.setattr(build_module._Builder, "_write", fail)
        assert run("images", path, "-o", out, "--workers", "0").exit_code == 130
        assert not out.exists()
    assert "is an unfinished run with other sources or options" in refuse(path, "-o", out, "--max-side", "64")
    monkeypatch.setattr(build_module._Builder, "_write", write)
    summary = build(path, "-o", out)
    assert summary["resumed_at"] == 60
    assert not kept
    for expected in whole.iterdir():
        assert (out / expected.name).read_bytes() == expected.read_bytes(), expected.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.jsonl", "out", "pictures", "whole"]


@pytest.mark.posix
def test_a_killed_run_with_workers_goes_on_and_leaves_no_process(tmp_path, out):
    names = write_pictures(tmp_path / "p", 40)
    rows = [{"image": f"p/{names[n % 40]}", "caption": f"row {n}"} for n in range(40_000)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    command = [sys.executable, "-c", "from microvlm.cli import data; data()", "images", path, "-o", out]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "journal.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a worker outlived its parent")
    write_lines(path, rows)
    # A thousand rows more than were safe are enough to see that it goes on.
    journal = json.loads((tmp_path / "out.partial" / "journal.json").read_text())
    summary = build(path, "-o", out)
    assert summary["resumed_at"] == journal["read"] >= 1000
    assert summary["kept"] == summary["read"] == 40_000


def test_workers_change_nothing_but_the_time(tmp_path, out):
    path = write_captions(tmp_path, 200)
    build(path, "-o", out)
    result = run("images", path, "-o", tmp_path / "b", "--workers", "2", "--json")
    assert result.exit_code == 0, result.stderr
    for expected in out.iterdir():
        assert (tmp_path / "b" / expected.name).read_bytes() == expected.read_bytes(), expected.name


def test_members_of_hostile_shards_lead_nowhere(tmp_path, out):
    (tmp_path / "secret.png").write_bytes(picture(99))
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
    hard = tarfile.TarInfo("c.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../secret.png"
    pipe = tarfile.TarInfo("d.png")
    pipe.type = tarfile.FIFOTYPE
    sparse = tarfile.TarInfo("e.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    members = [("../../a.png", picture(1)), ("../../a.txt", b"up and away")]
    for member in (link, hard, pipe):
        members += [(member, b""), (member.name.replace("png", "txt"), b"a caption")]
    members += [
        ("f.png", picture(2)),
        ("f.txt", b"good"),
        ("f.txt", b"twice"),
        ("g.png", picture(3)),
        ("g.txt", b"end"),
    ]
    summary = build(write_tar(tmp_path / "hostile.tar", members), "-o", out)
    assert summary["skipped"] == {"no picture named": 3}
    assert list(open_data(out).texts("train")) == ["up and away", "good", "end"]
    assert not list(tmp_path.parent.glob("a.png"))


def test_a_cut_shard_gives_what_is_before_the_cut(tmp_path, out):
    members = [m for n in range(9) for m in ((f"{n}.png", picture(n)), (f"{n}.txt", b"text %d" % n))]
    path = write_tar(tmp_path / "a" / "00000.tar", members)
    path.write_bytes(path.read_bytes()[: 512 * 4 * 6 + 700])
    write_tar(tmp_path / "a" / "00001.tar", [("x.png", picture(50)), ("x.txt", b"from the next")])
    (tmp_path / "a" / "00002.tar").write_bytes(b"<html>" * 400)
    summary = build(tmp_path / "a", "-o", out)
    assert summary["kept"] == 7
    assert summary["skipped"]["damaged record"] >= 2
    assert "from the next" in {text for split in SPLITS for text in open_data(out).texts(split)}


@pytest.mark.posix
def test_pipes_and_devices_are_not_waited_for(tmp_path, out):
    os.mkfifo(tmp_path / "pipe.png")
    write_pictures(tmp_path, 1)
    rows = [
        {"image": i, "caption": "a"} for i in ("pipe.png", "/dev/zero", "0000.png", "../../../etc/passwd")
    ]
    summary = build(
        write_lines(
            tmp_path / "deep" / "x" / "a.jsonl",
            [{**r, "image": f"../../{r['image']}"} if r["image"][0] != "/" else r for r in rows],
        ),
        "-o",
        out,
    )
    assert summary["kept"] == 1
    assert summary["skipped"]["picture cannot be read"] == 2


def test_a_preview_and_the_summary_say_what_is_in_the_folder(tmp_path, out):
    result = run("images", write_captions(tmp_path, 30), "-o", out, "--workers", "0")
    assert result.exit_code == 0, result.stderr
    assert "kept" in result.stdout
    assert f"Look at {out}/preview.jpg, then: microvlm-train test --data {out} -o RUN" in result.stdout
    with Image.open(out / "preview.jpg") as sheet:
        assert sheet.format == "JPEG"
        assert sheet.width == 6 * 166 + 6
        assert sheet.height == 4 * 210 + 6
    description = json.loads((out / "dataset.json").read_text())
    assert description["texts"] == {"texts": 30, "words_mean": 3.0, "words_most": 3, "vocabulary": 32}


def test_a_built_folder_is_trained_on_in_an_order_of_the_mixture(tmp_path, out):
    build(write_captions(tmp_path, 50), "-o", out)
    data = open_data(out)
    mixture = Mixture([(data, 1.0)], seed=1)
    samples = [mixture.sample(position) for position in range(mixture.epoch_length)]
    assert len({sample.key for sample in samples}) == data.count("train")
    assert np.asarray(load_square(samples[0].images[0], 32)).shape == (32, 32, 3)


def test_a_hash_set_knows_what_was_entered_before_and_after_it_is_sorted(monkeypatch):
    monkeypatch.setattr(split_choice, "_MERGE_AT", 10)
    hashes, entered = HashSet(), [(n * 7919 * 2**40) % 2**64 for n in range(95)]
    for value in entered:
        hashes.add(value)
    assert all(value in hashes for value in entered)
    assert 12345 not in hashes
    assert 2**64 - 1 not in hashes
