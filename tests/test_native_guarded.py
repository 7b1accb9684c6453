"""Programs around the kernels and the glue: arrays that end where memory ends, and a host for hostile nodes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "backends" / "native"
COMMANDS = ("cmake", "make", "c++")

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    build = tmp_path_factory.mktemp("programs")
    configure = ["cmake", "-G", "Unix Makefiles", "-S", SOURCE, "-B", build, "-DMICROVLM_TESTS=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    command = ["cmake", "--build", build, "--target", "native_variants", "test_glue", "--parallel", "2"]
    subprocess.run(command, check=True, capture_output=True)
    return build


def test_every_variant_stays_inside_its_arrays(build: Path) -> None:
    program = build / "native_variants"
    names = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert names[-1] == "reference"
    for name in names[:-1]:  # the last is the reference, with which the program compares the others
        result = subprocess.run([program, name], capture_output=True, text=True)
        assert result.returncode == 0, f"{name}: {result.stdout or 'ended by a signal'}"


def test_the_glue_takes_right_nodes_and_refuses_hostile_ones(build: Path) -> None:
    """The same program runs under the sanitizers in `nox -s native`, over ten times as many nodes."""
    variants = subprocess.run([build / "native_variants"], capture_output=True, text=True).stdout.split()
    result = subprocess.run([build / "test_glue", "2000", "7"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = re.findall(r"^([\w-]+): .* (\d+) random nodes refused, (\d+) right;", result.stdout, re.M)
    assert [name for name, _, _ in counts] == variants
    for _, refused, right in counts:
        assert int(refused) > 1000
        assert int(right) > 200
