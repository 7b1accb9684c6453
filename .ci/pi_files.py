"""Files for a board: the aarch64 wheel, `photo` as a bundle, a photograph. `nox -s pi-files -- FOLDER` runs it.

Needs ziglang, build, auditwheel and microvlm[export] beside it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import wheels

PICTURE = wheels.ROOT / "bench" / "photographs" / "koala.jpg"
MODEL = "photo"


def bundle_of(model: str) -> str:
    """Name of a bundled model's folder below the board's."""
    return f"{model}-1.58bit"


def make(folder: Path, *models: str) -> Path:
    """Fills `folder` -> the wheel in it. What an earlier run left there is replaced, and nothing else.

    models : bundled ones to export; MODEL alone when left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("microvlm-*.whl"):
        earlier.unlink()
    with tempfile.TemporaryDirectory() as build:
        wheel = Path(shutil.copy(wheels.build("aarch64", Path(build)), folder))
    export = "from microvlm.exporters.export_command import main; main()"
    for model in models or (MODEL,):
        # From the folder: in the repository's root, `microvlm` would be the source folder.
        flags = ("-o", bundle_of(model), "--bits", "1.58", "--force")
        wheels.python("-c", export, model, *flags, cwd=folder)
    shutil.copy(PICTURE, folder / "picture.jpg")
    return wheel


def main(folder: Path) -> None:
    make(folder)
    for path in sorted(folder.iterdir()):
        print(path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
