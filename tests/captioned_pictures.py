"""Writes small captioned data folders: discs and squares in a few colours, with captions that say what they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (220, 200, 40)}
SHAPES = ("disc", "square", "triangle")


def draw(colour: str, shape: str, number: int, side: int = 48) -> Image.Image:
    """A shape on a grey ground; the number decides its place and the ground's shade."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), (int(rng.integers(90, 200)),) * 3)
    left, top = (int(v) for v in rng.integers(2, side // 3, 2))
    box = (left, top, left + side // 2, top + side // 2)
    pen = ImageDraw.Draw(image)
    if shape == "disc":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon(
            [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=COLOURS[colour]
        )
    return image


def write_pictures(folder: Path, copies: int = 4) -> Path:
    """Pictures and captions.jsonl in a folder; returns the path of captions.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    number = 0
    for colour in COLOURS:
        for shape in SHAPES:
            for _ in range(copies):
                name = f"{number:03d}.png"
                draw(colour, shape, number).save(folder / name)
                rows.append({"image": name, "caption": f"a {colour} {shape}"})
                number += 1
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_data(folder: Path, copies: int = 4) -> Path:
    """A data folder of those pictures, as `microvlm-data images` writes it."""
    return build_data(write_pictures(folder / "pictures", copies), folder / "data")


def build_data(captions: Path, out: Path) -> Path:
    """The data folder `out`, which `microvlm-data images` makes of a file of captions."""
    from click.testing import CliRunner

    from microvlm.training.data.data_command import command

    result = CliRunner().invoke(command, ["images", str(captions), "-o", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def mixed_data(folder: Path) -> Path:
    """Captions, a question about two pictures, and an episode that asks about a picture that is gone."""
    captions = write_pictures(folder)
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    first = [row["image"] for row in rows]
    for number in range(16):
        pair = [first[number], first[number + 16]]
        rows.append({"images": pair, "question": "are they the same?", "answer": "no"})
        turns = [
            {"answer": rows[number]["caption"], "images": [0]},
            {"answer": rows[number + 16]["caption"], "images": [1]},
            {"question": "what came first?", "answer": rows[number]["caption"], "images": []},
        ]
        rows.append({"images": pair, "turns": turns})
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_data(captions, folder.parent / "mixed-data")
