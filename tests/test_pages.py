"""Pages for users: every console command runs as it stands there and prints what the page promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import complaints, read_blocks, read_steps, script, share_cache

from microvlm.backends.resolve import BUNDLES

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/memory.md", "docs/exporting.md", "docs/attention.md")
MARK = "page-step"


def environment(folder: Path) -> dict[str, str]:
    """This Python's programs first on the path, and the cache of `folder`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "MICROVLM_CACHE": str(folder / "cache")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the repository's evaluation pictures, as a checkout has them."""
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    share_cache(tmp_path / "cache", "emulation", BUNDLES)
    return tmp_path


@pytest.mark.pages
@pytest.mark.parametrize("name", PAGES)
def test_every_console_command_prints_what_the_page_promises(name: str, folder: Path) -> None:
    steps = read_steps(ROOT / name)
    assert len(steps) >= 3
    process = subprocess.run(
        ["bash", "-s"],
        input=script(steps, MARK),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    assert complaints(steps, process.stdout, MARK) == [], process.stderr


@pytest.mark.pages
def test_the_python_example_of_the_readme_prints_a_caption(folder: Path) -> None:
    (example,) = read_blocks(ROOT / "README.md", "python")
    process = subprocess.run(
        [sys.executable, "-P", "-c", example],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout) == (0, "koala\n"), process.stderr


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("backends/*/*.md")], ids=str
)
def test_every_file_and_heading_that_a_page_links_to_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)$", linked.read_text(encoding="utf-8"))
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, target
