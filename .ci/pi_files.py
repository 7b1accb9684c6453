"""What a board is given: the aarch64 wheel, `nano` as a bundle, a picture. `nox -s pi-files -- FOLDER` runs it.

Needs ziglang, build, auditwheel and microvlm[export] beside it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import wheels

PICTURE = wheels.ROOT / "bench" / "evalset" / "images" / "1f41c.png"
BUNDLE = "nano-1.58bit"


def make_wheel(folder: Path) -> Path:
    """`folder`/NAME.whl, built beside it."""
    built = wheels.build("aarch64", folder.with_name(f"{folder.name}.build"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Path(shutil.copy(built, folder))


def make(folder: Path) -> Path:
    """Fills `folder` anew -> the wheel in it."""
    wheel = make_wheel(folder)
    export = "from microvlm.exporters.cli import main; main()"
    # From the folder: in the repository's root, `microvlm` would be the source folder.
    wheels.python(
        "-c", export, "nano", "-o", BUNDLE, "--bits", "1.58", "--force", cwd=folder, env={**os.environ}
    )
    shutil.copy(PICTURE, folder / "picture.png")
    return wheel


def main(folder: Path) -> None:
    make(folder)
    for path in sorted(folder.iterdir()):
        print(path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
