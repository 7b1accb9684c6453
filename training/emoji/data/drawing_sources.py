"""The emoji sets with their artists and licences; installs their npm packages and parses their files.

Knows nothing about captions, splits or pixels.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from microvlm.atomic_folder import new_folder
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.documents import quote
from microvlm.sources.cache_directory import cache_directory, writable_cache

T = TypeVar("T")
LARGEST_PACKAGE_FILE = 256_000_000
"""Bytes; the icons of the largest set have 40 MB."""
MOST_ALIASES = 16
"""Longest chain of aliases that leads to a drawing."""


class DataError(UserError):
    """Bad input or a missing tool, described in one sentence; the command line exits with status 2."""


@dataclass(frozen=True)
class Source:
    """One set of drawings."""

    vendor: str
    """Name of the set, and last part of its npm package's name."""
    version: str
    """The pinned package version; another version may draw or name an emoji differently."""
    artwork: str
    """Name and maker of the artwork."""
    licence: str
    """SPDX identifier of the artwork's licence."""
    use: str
    """`train`, `test`, `stress`, or `drawings` (icons without captions that are not emoji)."""

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.vendor}"


SOURCES = (
    Source("noto", "1.2.9", "Noto Emoji, Google", "Apache-2.0", "train"),
    Source("noto-v1", "1.2.5", "Noto Emoji (first design), Google", "Apache-2.0", "train"),
    Source("twemoji", "1.2.5", "Twemoji, Twitter and contributors", "CC-BY-4.0", "train"),
    Source("fluent-emoji", "1.2.7", "Fluent Emoji (3D), Microsoft", "MIT", "train"),
    Source("fluent-emoji-flat", "1.2.6", "Fluent Emoji (flat), Microsoft", "MIT", "train"),
    Source("fluent-emoji-high-contrast", "1.2.6", "Fluent Emoji (high contrast), Microsoft", "MIT", "train"),
    Source("fxemoji", "1.2.2", "FxEmojis, Mozilla", "CC-BY-4.0", "train"),
    # EmojiOne 2.x lives on as EmojiTwo; no drawing of it is ever trained on.
    Source("emojione", "1.2.3", "EmojiOne 2.x / EmojiTwo", "CC-BY-4.0", "test"),
    # Share-alike line art: the hardest set, for stress tests only, in no bundled checkpoint.
    Source("openmoji", "1.2.29", "OpenMoji, HfG Schwäbisch Gmünd", "CC-BY-SA-4.0", "stress"),
)
TRAIN_VENDORS = tuple(s.vendor for s in SOURCES if s.use == "train")
TEST_VENDOR = "emojione"
STRESS_VENDOR = "openmoji"
LABELS_PACKAGE = ("emojibase-data", "17.0.0")


class _Package(msgspec.Struct, frozen=True):
    """npm's package.json."""

    dependencies: dict[str, str]


def install_packages(versions: dict[str, str], name: str) -> Path:
    """Install packages (name -> version) with npm once, as `name` in the cache; returns their node_modules folder.

    Install scripts do not run. Raises DataError if npm is missing or fails, UserError if the cache cannot be written.
    """
    final = cache_directory() / name
    with contextlib.suppress(FileNotFoundError, UserError):  # none yet, or a damaged one: installed again
        if documents.load(final / "package.json", _Package, "install again").dependencies == versions:
            return final / "node_modules"
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm was not found: install Node.js, or pass an existing folder with --packages.")
    writable_cache()
    with new_folder(final, replace=lambda _: True) as temporary:
        manifest = {"name": "microvlm-emoji", "version": "0.0.0", "private": True, "dependencies": versions}
        (temporary / "package.json").write_text(json.dumps(manifest))
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
        process = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or ["no message"])[0]
            raise DataError(f"npm could not install the packages of the drawings: {reason}")
    return final / "node_modules"


def find_packages(packages: Path | None) -> Path:
    """The node_modules folder to read: the user's, which is checked, or the installed one."""
    if packages is None:
        return install_packages({s.package: s.version for s in SOURCES} | dict([LABELS_PACKAGE]), "npm")
    root = packages / "node_modules" if (packages / "node_modules").is_dir() else packages
    if not (root / LABELS_PACKAGE[0]).is_dir():
        name = LABELS_PACKAGE[0]
        raise DataError(f"--packages {packages} holds no {name}: it must be a node_modules folder.")
    return root


def read_json(path: Path, kind: type[T]) -> T:
    """Parse one package file -> a value of type `kind`. Raises DataError, naming the file, if it is missing or bad."""
    try:
        return documents.load(path, kind, "install the packages again", LARGEST_PACKAGE_FILE)
    except FileNotFoundError:
        raise DataError(f"The emoji packages are incomplete: {path} is missing.") from None
    except UserError as error:
        raise DataError(f"The emoji packages are damaged: {error}") from None


Coordinate = Annotated[int, Meta(ge=-100_000, le=100_000)] | Annotated[float, Meta(ge=-1e5, le=1e5)]
Length = Annotated[int, Meta(ge=1, le=100_000)] | Annotated[float, Meta(gt=0, le=1e5)]


class Icon(msgspec.Struct, frozen=True):
    """One drawing: what is within its svg element, and its place where it is not the set's."""

    body: str
    left: Coordinate = 0
    top: Coordinate = 0
    width: Length | None = None
    height: Length | None = None


class Alias(msgspec.Struct, frozen=True):
    """Another name of a drawing, which may be mirrored or turned by quarters."""

    parent: str
    rotate: Annotated[int, Meta(ge=-3, le=3)] = 0
    hFlip: bool = False
    vFlip: bool = False


class IconFile(msgspec.Struct, frozen=True):
    """A package's icons.json."""

    icons: dict[str, Icon]
    aliases: dict[str, Alias] = {}
    width: Length = 16
    height: Length = 16


class IconSet:
    """The drawings of one vendor: names, aliases and SVG text.

    chars : lower-case hexcode -> icon name, for packages that list them.
    """

    def __init__(self, source: Source, root: Path):
        folder = root / source.package
        file = read_json(folder / "icons.json", IconFile)
        self.source = source
        self.icons, self.aliases = file.icons, file.aliases
        self.width, self.height = file.width, file.height
        chars = folder / "chars.json"
        self.chars: dict[str, str] = read_json(chars, dict[str, str]) if chars.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self.icons or name in self.aliases

    def svg(self, name: str) -> str:
        """The SVG document of an icon or alias; an alias may mirror or turn its parent. Raises DataError."""
        turns, mirror, flip = 0, False, False
        icon, steps = self._drawing(name), 0
        while isinstance(icon, Alias):
            turns += icon.rotate
            mirror ^= icon.hFlip
            flip ^= icon.vFlip
            icon, steps = self._drawing(icon.parent), steps + 1
            if steps > MOST_ALIASES:
                raise DataError(
                    f"The emoji packages are damaged: {self.source.vendor} {quote(name)} is an alias of itself."
                )
        left, top = icon.left, icon.top
        width, height = icon.width or self.width, icon.height or self.height
        body = icon.body
        if turns or mirror or flip:
            cx, cy = left + width / 2, top + height / 2
            scale = f"scale({-1 if mirror else 1} {-1 if flip else 1})"
            place = f"translate({cx} {cy}) rotate({90 * turns}) {scale} translate({-cx} {-cy})"
            body = f'<g transform="{place}">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
        )

    def _drawing(self, name: str) -> Icon | Alias:
        drawing = self.aliases.get(name) or self.icons.get(name)
        if drawing is None:
            raise DataError(f"The emoji packages are damaged: {self.source.vendor} has no {quote(name)}.")
        return drawing
