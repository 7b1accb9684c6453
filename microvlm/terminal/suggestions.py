"""Types of options and arguments whose values a shell can complete. They check nothing: a command does.

Completion runs at each press of the Tab key, so names are looked up only then, and no module here imports numpy, torch
or ONNX Runtime.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import click
from click.shell_completion import CompletionItem

from microvlm.formats import weight_format
from microvlm.sources.model_source import BUNDLED

Paths = Literal["file", "dir"]
_MOST_ENTRIES = 10_000
_PLAIN_NAME = re.compile(r"\w[\w.-]*")


class Suggested(click.ParamType):
    """Text that may be one of some names, a path, or anything else.

    `name` is how the value is called in a help text; `names` gives the names to complete; `paths` says whether the
    shell also completes files or folders.
    """

    def __init__(self, name: str, names: Callable[[], Iterable[str]] = tuple, paths: Paths | None = None):
        self.name, self.names, self.paths = name, names, paths

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = [name for name in self.names() if name.startswith(incomplete)]
        if self.paths is None or not names:
            return [CompletionItem(incomplete, type=self.paths)] if self.paths else _items(names)
        # Beside names of ours bash completes no paths of its own: photo must not hide the folder photo-1.58bit.
        return _items(dict.fromkeys([*names, *_entries(incomplete, self.paths)]))


def _items(names: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names]


def _entries(incomplete: str, paths: Paths) -> list[str]:
    """Entries of the working directory that begin so, without those that a shell would have to quote."""
    try:
        with os.scandir() as entries:
            found = [
                entry.name
                for entry in itertools.islice(entries, _MOST_ENTRIES)
                if entry.name.startswith(incomplete) and (paths == "file" or entry.is_dir())
            ]
    except OSError:
        return []
    return sorted(name for name in found if _PLAIN_NAME.fullmatch(name))


def _backends() -> list[str]:
    from microvlm.backends.base import backend_names

    return backend_names()


def _presets() -> list[str]:
    from microvlm.presets import preset_names

    return preset_names()


FILE = Suggested("file", paths="file")
FOLDER = Suggested("folder", paths="dir")
MODEL = Suggested("model", lambda: BUNDLED, "dir")
"""A checkpoint or a bundle."""
PRESET = Suggested("model", _presets, "dir")
"""A preset, or the folder of a checkpoint."""
BITS = Suggested("bits", lambda: [f"{width:g}" for width in weight_format.BITS])
EMBEDDING_BITS = Suggested("bits", lambda: [f"{width:g}" for width in weight_format.EMBEDDING_BITS])
BACKEND = Suggested("name", _backends)
TARGET = Suggested("where", lambda: ("local", "emulated", "ssh:"))
"""The device of backend ort-arm64."""
DEVICE = Suggested("device", lambda: ("cpu", "cuda"))
"""The device of backend torch."""
