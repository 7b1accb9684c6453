"""The Python examples of docs/api.md are run, and print what the page shows below them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import share_cache

import microvlm
from microvlm.backends.resolve import BUNDLES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text()
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```$)?", re.M | re.S)
MARK = "-- end of an example --"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The output of each example when the page runs as one program, in a folder with the evaluation images."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "bench").symlink_to(ROOT / "bench")
    share_cache(folder / "cache", BUNDLES)
    program = "".join(f"{code}print({MARK!r})\n" for code, _ in EXAMPLE.findall(PAGE))
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "MICROVLM_CACHE": str(folder / "cache")},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split(f"{MARK}\n")[:-1]


@pytest.mark.pages
def test_every_example_prints_what_the_page_shows(outputs: list[str]) -> None:
    page_outputs = [text for _, text in EXAMPLE.findall(PAGE)]
    assert all(page_outputs), "an example has no output"
    assert outputs == page_outputs


def test_every_public_name_has_an_example() -> None:
    examples = "".join(code for code, _ in EXAMPLE.findall(PAGE))
    names = set(microvlm.__all__) - {"LoadedModel"}  # what `load` returns; nobody imports it to build one
    assert [name for name in sorted(names) if f"from microvlm import {name}\n" not in examples] == []
    assert "LoadedModel" in PAGE
