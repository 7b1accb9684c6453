"""Files for a board: the aarch64 wheel, `nano` as a bundle, a picture. `nox -s pi-files -- FOLDER` runs it.

Needs ziglang, build, auditwheel and microvlm[export] beside it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import wheels

PICTURE = wheels.ROOT / "bench" / "evalset" / "images" / "1f355.png"
BUNDLE = "nano-1.58bit"


def make(folder: Path) -> Path:
    """Fills `folder` -> the wheel in it. What an earlier run left there is replaced, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("microvlm-*.whl"):
        earlier.unlink()
    with tempfile.TemporaryDirectory() as build:
        wheel = Path(shutil.copy(wheels.build("aarch64", Path(build)), folder))
    export = "from microvlm.exporters.export_command import main; main()"
    # From the folder: in the repository's root, `microvlm` would be the source folder.
    wheels.python("-c", export, "nano", "-o", BUNDLE, "--bits", "1.58", "--force", cwd=folder)
    shutil.copy(PICTURE, folder / "picture.png")
    return wheel


def main(folder: Path) -> None:
    make(folder)
    for path in sorted(folder.iterdir()):
        print(path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
