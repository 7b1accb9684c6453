"""`microvlm-data examples`: the table of photographs, Qt resource archives, and packages that the tests make."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import struct
import subprocess
import zipfile
import zlib

import pytest
from captioned_sources import build, picture
from drawn_emoji import run

from microvlm.errors import UserError
from microvlm.training.data.examples import photographs
from microvlm.training.data.examples.photographs import GCOMPRIS, SCIKIT, Photograph, read_photographs
from microvlm.training.data.examples.qt_resources import read_resources


def archive(files: dict[str, bytes], compress: bool) -> bytes:
    """A Qt resource archive of version 2 with one folder."""
    names, data, nodes = b"", b"", b""

    def name(text: str) -> int:
        nonlocal names
        offset = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return offset

    nodes += struct.pack(">IHII", 0, 2, 1, 1) + bytes(8)
    nodes += struct.pack(">IHII", name("deep"), 2, len(files), 2) + bytes(8)
    for text, content in files.items():
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if compress else content
        nodes += struct.pack(">IHHHI", name(text), int(compress), 0, 0, len(data)) + bytes(8)
        data += struct.pack(">I", len(stored)) + stored
    start = 20
    places = (2, start, start + len(nodes), start + len(nodes) + len(data))
    return b"qres" + struct.pack(">4I", *places) + nodes + data + names


def test_every_photograph_has_a_name_a_caption_and_free_terms():
    table = read_photographs()
    assert len(table) > 200
    for key in ("name", "caption", "sha256"):
        assert len({getattr(photograph, key) for photograph in table}) == len(table), key
    assert {p.licence for p in table} == {"public domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-3.0"}
    assert all(p.author for p in table)
    assert all(p.source for p in table if p.licence.startswith("CC-BY"))
    assert all(p.caption == p.caption.strip().lower() and 3 <= len(p.caption.split()) <= 12 for p in table)


@pytest.mark.parametrize("compress", [False, True])
def test_a_qt_resource_archive_is_read(compress):
    files = {"a.webp": b"picture" * 50, "README": b"text"}
    found = dict(read_resources(archive(files, compress), "a.rcc"))
    assert found == {f"deep/{name}": content for name, content in files.items()}


def test_damaged_resource_archives_are_one_sentence():
    whole = archive({"a.webp": b"picture" * 50}, True)
    circle = bytearray(whole)
    circle[20 + 22 + 10 : 20 + 22 + 14] = struct.pack(">I", 1)
    for content in (b"", b"qres", b"PK" * 40, bytes(circle), *(whole[:n] for n in range(4, len(whole), 7))):
        with contextlib.suppress(UserError):
            list(read_resources(content, "a.rcc"))
    with pytest.raises(UserError, match="circle"):
        list(read_resources(bytes(circle), "a.rcc"))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A wheel and a .deb with a picture each that the table names, and one that it does not."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    folder = tmp_path / "packages"
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/share/gcompris-qt/rcc").mkdir(parents=True)
    folder.mkdir()
    (tree / "DEBIAN/control").write_text(
        f"Package: {GCOMPRIS}\nVersion: 9\nArchitecture: all\nMaintainer: a <a@b.example>\nDescription: a\n"
    )
    content = archive({"one.png": picture(1), "two.png": picture(2)}, True)
    (tree / "usr/share/gcompris-qt/rcc/a.rcc").write_bytes(content)
    subprocess.run(
        ["dpkg-deb", "-b", tree, folder / f"{GCOMPRIS}_9_all.deb"], check=True, capture_output=True
    )
    with zipfile.ZipFile(folder / "scikit_image-9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("skimage/data/three.png", picture(3))
        wheel.writestr("skimage/data/four.png", b"another version's")
    rows = [(GCOMPRIS, "a.rcc", "deep/one.png", 1), (SCIKIT, "", "skimage/data/three.png", 3)]
    rows.append((SCIKIT, "", "skimage/data/four.png", 4))
    table = [
        Photograph(
            p, a, f, hashlib.sha256(picture(n)).hexdigest(), f"number {n}", "CC0-1.0", f"author {n}", ""
        )
        for p, a, f, n in rows
    ]
    monkeypatch.setattr(photographs, "read_photographs", lambda: table)
    return folder


def test_photographs_of_packages_become_a_data_folder(tmp_path, packages):
    result = run("examples", "-o", tmp_path / "out", "--packages", packages)
    assert result.exit_code == 0, result.stderr
    assert f"microvlm-data images {tmp_path}/out/captions.jsonl -o DATA" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert sorted(row["image"] for row in rows) == ["data-three.png", "deep-one.png"]
    licences = (tmp_path / "out/LICENCES").read_text()
    assert "deep-one.png\n  CC0-1.0, author 1\n" in licences
    assert build(tmp_path / "out/captions.jsonl", "-o", tmp_path / "data")["kept"] == 2
    assert run("examples", "-o", tmp_path / "out", "--packages", packages).exit_code == 2


def test_without_apt_the_photographs_of_scikit_image_are_left(tmp_path, packages, monkeypatch):
    next(packages.glob("*.deb")).unlink()
    result = run("examples", "-o", tmp_path / "out", "--packages", packages, "--json")
    document = json.loads(result.stdout)
    assert document["written"] == {SCIKIT: 1, GCOMPRIS: 0}
    assert "no photographs of gcompris-qt-data:" in result.stderr
    next(packages.glob("*.whl")).unlink()
    refused = run("examples", "-o", tmp_path / "none", "--packages", packages)
    assert refused.exit_code == 2
    assert "no photographs could be had" in refused.stderr
    assert not (tmp_path / "none").exists()
