"""docs/adding.md's packings, added to a copy of the sources as the page says, pass the tests of every packing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding.md"
STEP = re.compile(r"At the end of `([\w/]+\.py)`.*?```python\n(.*?)^```", re.M | re.S)
TESTS = ("test_packings.py", "test_op_table.py", "test_function_bodies.py")


def steps(section: str) -> list[tuple[str, str]]:
    """(file, code to append) in the order of a section of the page."""
    body = re.split(r"^### ", PAGE.read_text(), flags=re.M)
    (text,) = (part for part in body if part.startswith(section))
    return STEP.findall(text)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package as it would lie in a checkout, its links followed, without compiled libraries."""
    unneeded = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "checkpoints")
    shutil.copytree(ROOT / "microvlm", tmp_path / "microvlm", ignore=unneeded)
    return tmp_path


@pytest.mark.parametrize(
    ("section", "most_files", "selected"),
    [("Digits in planes", 2, "byte or 2x1"), ("Any other bytes", 4, "msb or Msb")],
)
@pytest.mark.pages
def test_a_packing_of_the_page_touches_few_files_and_passes_the_tests_of_every_packing(
    section: str, most_files: int, selected: str, copy: Path
) -> None:
    edits = steps(section)
    assert len({file for file, _ in edits}) == most_files
    for file, code in edits:
        target = copy / (file if file.startswith("microvlm/") else f"microvlm/{file}")
        target.write_text(f"{target.read_text()}\n\n{code}")
    process = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected]
        + [str(ROOT / "tests" / name) for name in TESTS],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    # Status 5 means that nothing was selected: the new packing was not in the table.
    assert process.returncode == 0, process.stdout + process.stderr
