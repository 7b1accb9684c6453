"""No variant of this machine touches a byte beyond its arrays, which end where pages without access begin."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "backends" / "native"
COMMANDS = ("cmake", "make", "c++")


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
    for name in names[:-1]:  # the last is what the others are compared with
        done = subprocess.run([program, name], capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout or 'ended by a signal'}"
