"""Captioned pictures in every layout that `microvlm-data images` reads, drawn by the tests."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

from drawn_emoji import run
from PIL import Image


def picture(number: int, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    """A picture of its own for each number."""
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number // 256 * 40 % 256))
    image.putpixel((0, 0), (number % 256, number // 256 % 256, 7))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_pictures(folder: Path, count: int, start: int = 0) -> list[str]:
    """Write pictures into a folder -> their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:04d}.png" for number in range(start, start + count)]
    for number, name in enumerate(names, start):
        (folder / name).write_bytes(picture(number))
    return names


def write_lines(path: Path, rows: list) -> Path:
    """JSON lines; a row that is text or bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_captions(folder: Path, count: int) -> Path:
    """A captions.jsonl of so many pictures."""
    names = write_pictures(folder / "pictures", count)
    rows = [{"image": f"pictures/{name}", "caption": f"picture number {n}"} for n, name in enumerate(names)]
    return write_lines(folder / "captions.jsonl", rows)


def write_csv(path: Path, header: list[str], rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """A tar file of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if member.isreg():
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def build(*arguments: object) -> dict:
    """Run `microvlm-data images ... --json` in this process -> its document."""
    result = run("images", *arguments, "--json", "--workers", "0")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refuse(*arguments: object) -> str:
    """Run `microvlm-data images`, which must refuse -> its sentence."""
    result = run("images", *arguments, "--workers", "0")
    assert result.exit_code == 2, (result.stdout, result.stderr)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    assert "Traceback" not in result.stderr
    return message
