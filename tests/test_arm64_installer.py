"""The device's cache after a power cut, on a full card and with two hosts at once. Needs no connection."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microvlm.backends.arm64.device.installer import KEPT_DAYS, MARK, Installer
from microvlm.backends.arm64.frames import Tensor
from microvlm.backends.arm64.transports import delivery
from microvlm.backends.arm64.transports.delivery import Delivery
from microvlm.backends.arm64.transports.device_package import DevicePackage
from microvlm.errors import UserError
from microvlm.formats.manifest import FileEntry, Manifest

Hook = Callable[[str], None]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def archive(content: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("microvlm/__init__.py", content)
        file.writestr("microvlm/more.py", "x = 1\n")
    return buffer.getvalue()


class DirectDelivery(Delivery):
    """Delivers to an installer in this process; `before` and `after` are called with the name of every request."""

    def __init__(self, root: Path, before: Hook = lambda _: None, after: Hook = lambda _: None):
        self.requests: list[str] = []
        self._installer, self._before, self._after = Installer(root), before, after
        super().__init__(None, "a device", lambda *_: None)  # type: ignore[arg-type]

    def _request(self, action: str, tensors: tuple[Tensor, ...] = (), **request: Any) -> dict[str, Any]:
        self.requests.append(action)
        self._before(action)
        answer = getattr(self._installer, action)(json.loads(json.dumps(request)), list(tensors))
        self._after(action)
        return {"root": str(self._installer.root), **answer}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "device"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a bundle's, whose manifest nobody reads."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights.data").write_bytes(b"w" * 5000)
    (folder / "manifest.json").write_text("{}")
    entry = FileEntry(5000, digest(b"w" * 5000))
    manifest = Manifest(format=2, graphs={}, lowered={}, files={"weights.data": entry})
    monkeypatch.setattr(delivery, "open_bundle", lambda _: manifest)
    monkeypatch.setattr(delivery, "PIECE_BYTES", 1000)
    return folder


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Content -> the folder, on the device, of the package with it, which is sent from now on."""

    def choose(content: str) -> Path:
        chosen = DevicePackage(archive(content), "")
        monkeypatch.setattr(delivery, "package_for", lambda _: chosen)
        return Path("packages", chosen.digest[:16])

    monkeypatch.setattr(Delivery, "_site", lambda _: [])
    return choose


def test_files_are_flushed_before_they_get_their_name_and_the_mark_comes_last(
    root: Path, bundle: Path, package, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    bad: list[str] = []
    renamed_files: list[str] = []
    real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def fsync(file: int) -> None:
        flushed.add(os.fstat(file).st_ino)
        real_fsync(file)

    def sync() -> None:
        flushed.update(path.stat().st_ino for path in root.rglob("*"))

    def move(real: Callable) -> Callable:
        def moved(source: Path, target: Path) -> None:
            inside = [source, *source.rglob("*")] if source.is_dir() else [source]
            bad.extend(str(path) for path in inside if path.is_file() and path.stat().st_ino not in flushed)
            renamed_files.append(target.name)
            real(source, target)

        return moved

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "sync", sync)
    monkeypatch.setattr(os, "replace", move(real_replace))
    monkeypatch.setattr(os, "rename", move(real_rename))
    folder = package("a = 1\n")
    delivery = DirectDelivery(root)
    delivery.packages()
    copy_folder = Path(delivery.bundle(bundle))
    assert {"weights.data", "manifest.json", folder.name} <= set(renamed_files)
    assert bad == []
    assert delivery.requests[-2:] == ["put", "finish"]
    for marked in (root / folder, copy_folder):
        assert {(marked / MARK).stat().st_ino, marked.stat().st_ino} <= flushed


def test_an_unmarked_copy_that_lost_bytes_to_a_power_cut_is_sent_again(root: Path, bundle: Path) -> None:
    class PowerCut(Exception):
        pass

    def cut(action: str) -> None:
        if action == "finish":
            raise PowerCut

    with pytest.raises(PowerCut):
        DirectDelivery(root, before=cut).bundle(bundle)
    copy_file = next(root.glob("bundles/*/weights.data"))
    copy_file.write_bytes(bytes(5000))
    again = DirectDelivery(root)
    again.bundle(bundle)
    assert copy_file.read_bytes() == b"w" * 5000
    assert again.requests.count("put") == 5
    # A marked folder is trusted: nothing is sent, and no large file is read.
    third = DirectDelivery(root)
    third.bundle(bundle)
    assert third.requests == ["look", "missing"]
    copy_file.write_bytes(b"w" * 4000)
    third.bundle(bundle)
    assert copy_file.read_bytes() == b"w" * 5000
    assert third.requests[-1] == "finish"


def test_a_package_with_emptied_files_is_sent_again(root: Path, package) -> None:
    folder = root / package("a = 1\n")
    DirectDelivery(root).packages()
    module = folder / "microvlm" / "more.py"
    module.write_text("")
    (folder / "microvlm" / "__pycache__").mkdir()
    (folder / "microvlm" / "__pycache__" / "more.pyc").write_bytes(b"of the worker")
    DirectDelivery(root).packages()
    assert module.read_text() == "x = 1\n"
    (folder / "microvlm" / "__pycache__").mkdir()
    (folder / "microvlm" / "__pycache__" / "more.pyc").write_bytes(b"of the worker")
    again = DirectDelivery(root)
    again.packages()
    assert "put" not in again.requests


def test_two_hosts_with_different_versions_keep_their_archives_apart(root: Path, package) -> None:
    class Paused(Exception):
        pass

    def pause(action: str) -> None:
        if action == "unpack":
            raise Paused

    def other_host(action: str) -> None:
        if action == "unpack":
            package("b = 2\n")
            with pytest.raises(Paused):
                DirectDelivery(root, before=pause).packages()

    ours = package("a = 1\n")
    DirectDelivery(root, before=other_host).packages()
    assert (root / ours / "microvlm" / "__init__.py").read_text() == "a = 1\n"
    theirs = package("b = 2\n")
    DirectDelivery(root).packages()
    assert (root / theirs / "microvlm" / "__init__.py").read_text() == "b = 2\n"


def test_an_archive_with_another_hash_is_removed_and_not_unpacked(root: Path, package) -> None:
    def spoil(action: str) -> None:
        if action == "unpack":
            next(root.glob("wheels/*.zip")).write_bytes(archive("b = 2\n"))

    folder = root / package("a = 1\n")
    with pytest.raises(zipfile.BadZipFile, match="another hash"):
        DirectDelivery(root, before=spoil).packages()
    assert not folder.exists()
    assert list((root / "wheels").iterdir()) == []
    DirectDelivery(root).packages()
    assert (folder / "microvlm" / "__init__.py").read_text() == "a = 1\n"


@pytest.mark.parametrize("content", [b"w" * 1500, b"v" * 5000])
def test_a_file_that_changes_while_it_is_copied_is_refused_in_one_sentence(
    content: bytes, root: Path, bundle: Path
) -> None:
    file = bundle / "weights.data"
    with pytest.raises((UserError, OSError), match=r"became shorter|hash changed"):
        DirectDelivery(root, after=lambda action: action == "put" and file.write_bytes(content)).bundle(
            bundle
        )
    with pytest.raises(UserError, match=r"weights\.data was altered"):
        DirectDelivery(root).bundle(bundle)
    file.write_bytes(b"w" * 5000)
    assert Path(DirectDelivery(root).bundle(bundle), "weights.data").read_bytes() == b"w" * 5000


def age(path: Path, days: float = KEPT_DAYS + 1) -> None:
    past = path.stat().st_mtime - days * 86400
    os.utime(path, (past, past))


def test_a_new_bundle_removes_unused_folders_that_no_worker_holds(root: Path, bundle: Path) -> None:
    folders = [root / kind / name for kind in ("bundles", "packages") for name in ("old", "held", "young")]
    files = [root / "wheels" / "old.whl", root / "wheels" / ".old.whl.part"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    for path in [*folders, *files]:
        if path.name != "young":
            age(path)
    holds = [os.open(folder, os.O_RDONLY) for folder in folders if folder.name == "held"]
    for descriptor in holds:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    # An old partial copy of this bundle is completed.
    partial = root / "bundles" / digest(b"{}")[:16]
    partial.mkdir()
    (partial / ".weights.data.part").write_bytes(b"w" * 3000)
    age(partial)
    delivery = DirectDelivery(root)
    copy_folder = Path(delivery.bundle(bundle))
    assert delivery.requests.count("put") == 3
    assert copy_folder == partial
    assert {path.name for path in root.glob("bundles/*")} == {"held", "young", partial.name}
    assert {path.name for path in root.glob("packages/*")} == {"held", "young"}
    assert list(root.glob("wheels/*")) == []
    for descriptor in holds:
        os.close(descriptor)
    (copy_folder / "weights.data").unlink()
    DirectDelivery(root).bundle(bundle)
    assert not (root / "bundles" / "held").exists()


def test_a_device_whose_user_has_no_home_says_what_to_set(monkeypatch):
    from microvlm.backends.arm64.device.installer import cache_root

    for name in ("MICROVLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(OSError, match="its user has no home folder; set MICROVLM_CACHE there"):
        cache_root()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("MICROVLM_CACHE", "/somewhere")
    assert str(cache_root()) == "/somewhere/device"
