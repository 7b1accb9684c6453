"""No variant that runs here reads or writes behind its arrays: each ends where a page without access begins."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "backends" / "native"
COMMANDS = ("cmake", "make", "c++")

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    build = tmp_path_factory.mktemp("guarded")
    configure = ["cmake", "-G", "Unix Makefiles", "-S", SOURCE, "-B", build, "-DMICROVLM_TESTS=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    command = ["cmake", "--build", build, "--target", "native_variants", "--parallel", "2"]
    subprocess.run(command, check=True, capture_output=True)
    return build / "native_variants"


def test_every_variant_stays_inside_its_arrays(program: Path) -> None:
    names = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert names[-1] == "reference"
    for name in names[:-1]:  # the last is the reference, with which the program compares the others
        result = subprocess.run([program, name], capture_output=True, text=True)
        assert result.returncode == 0, f"{name}: {result.stdout or 'ended by a signal'}"
