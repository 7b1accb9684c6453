"""Draws a tiny set of emoji packages: every scene object as a disc of its own colour, and three more things."""

import contextlib
import io
import json
from typing import NamedTuple

import pytest

from microvlm.console import run_click
from microvlm.training.emoji.data.drawing_sources import SOURCES
from microvlm.training.emoji.data.scenes import read_scene_objects

EXTRA = [("1F6AA", "wide door"), ("1F6AB", "tall door"), ("1F6AC", "lonely thing")]
ROWS = [*read_scene_objects(), *EXTRA]
GROUPS = {"groups": {"0": "objects", "2": "component", "9": "flags"}, "subgroups": {"0": "thing"}}


def colour(index):
    """The colour of a row; any two rows differ clearly."""
    return (index % 7 * 40 + 7, index // 7 * 34 + 7, (index * 3) % 8 * 30 + 15)


def write_json(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def draw(index, caption):
    fill = "rgb({},{},{})".format(*colour(index))
    if caption == "wide door":
        return {"body": f'<rect width="64" height="32" fill="{fill}"/>', "height": 32}
    if caption == "tall door":
        return {"body": f'<rect width="32" height="64" fill="{fill}"/>', "width": 32}
    return {"body": f'<circle cx="32" cy="32" r="30" fill="{fill}"/>'}


def write_packages(root):
    """Write a node_modules folder with the 48 scene objects and EXTRA; openmoji draws each as the next row."""
    labels = [
        {"hexcode": hexcode, "label": caption, "group": 0, "subgroup": 0, "order": i}
        for i, (hexcode, caption) in enumerate(ROWS)
    ]
    labels.append(
        {"hexcode": "1F468-200D-1F527", "label": "man mechanic", "group": 0, "subgroup": 0, "order": 98}
    )
    labels.append(
        {"hexcode": "1F3C3-200D-2642-FE0F", "label": "man running", "group": 0, "gender": 1, "order": 99}
    )
    labels.append({"hexcode": "1F1E6", "label": "regional indicator a"})
    labels.append({"hexcode": "1F3F3-FE0F", "label": "white flag", "group": 9, "subgroup": 0, "order": 100})
    write_json(root / "emojibase-data/en/data.json", labels)
    write_json(root / "emojibase-data/meta/groups.json", GROUPS)
    write_json(root / "emojibase-data/meta/unicode-names.json", {"1F6AC": "SOLITARY THING"})
    for source in SOURCES:
        icons, aliases, chars = {}, {}, {}
        for i, (hexcode, caption) in enumerate(ROWS):
            name = caption.replace(" ", "" if source.vendor == "fxemoji" else "-")
            icons[name] = draw((i + 1) % len(ROWS) if source.vendor == "openmoji" else i, caption)
            chars[hexcode.lower()] = name
        if source.vendor == "noto-v1":
            icons["solitary-thing"] = icons.pop("lonely-thing")
        if source.vendor == "twemoji":
            half = '<rect width="32" height="64" fill="black"/>'
            icons["left-half"] = {"body": half}
            aliases["lonely-thing"] = {"parent": "left-half", "hFlip": True}
            del icons["lonely-thing"]
        if source.vendor == "fxemoji":
            del icons["lonelything"]
        document = {"icons": icons, "aliases": aliases, "width": 64, "height": 64}
        write_json(root / source.package / "icons.json", document)
        if source.vendor in ("noto", "openmoji", "twemoji"):
            write_json(root / source.package / "chars.json", chars)


class Finished(NamedTuple):
    """The exit status and the output of a command."""

    exit_code: int
    stdout: str
    stderr: str


def run(*arguments):
    """Run `microvlm-data` with these arguments in this process."""
    from microvlm.training.data.data_command import command

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit_info,
    ):
        run_click(command, [str(a) for a in arguments])
    return Finished(exit_info.value.code, out.getvalue(), err.getvalue())
