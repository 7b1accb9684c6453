"""Reads a page's commands and their promised output, and compares what a shell prints with it.

In a ```console block a line that starts with `$ ` is a command and the lines after it are its output. A line `...`
stands for any lines, `...` inside a line for any text. The commands of a page share one shell.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from microvlm.sources.cache_directory import cache_directory


@dataclass(frozen=True)
class Step:
    command: str
    promised: tuple[str, ...]


def read_blocks(page: Path, language: str) -> list[str]:
    """The content of the page's code blocks in a language, in order."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"))


def read_steps(page: Path) -> list[Step]:
    """The commands of the page's console blocks, in order. Raises ValueError for output before any command."""
    steps = []
    for block in read_blocks(page, "console"):
        first, *commands = re.split(r"(?m)^\$ ", block)
        if first:
            raise ValueError(f"{page.name} has a console block that starts with output: {first!r}")
        for text in commands:
            command, *promised = text.splitlines()
            steps.append(Step(command, tuple(promised)))
    return steps


def script(steps: list[Step], mark: str) -> str:
    """A shell script of all steps: a line with the mark before each, one with the mark and the exit status after it."""
    parts = []
    for number, step in enumerate(steps):
        parts.append(f"echo {shlex.quote(f'{mark} start {number}')}\n{step.command}\n")
        parts.append(f'ended=$?; echo; echo "{mark} end {number} $ended"\n')
    return "".join(parts)


def read_outputs(text: str, mark: str) -> dict[int, tuple[str, int]]:
    """Number of a step -> (its output, its exit status), for the steps that ended."""
    blocks = re.findall(rf"(?ms)^{mark} start (\d+)\n(.*?)\n{mark} end \1 (\d+)$", text)
    return {int(number): (output, int(status)) for number, output, status in blocks}


def is_as_promised(output: str, promised: tuple[str, ...]) -> bool:
    """Whether output and promise are equal, `...` aside. Blanks at a line's end do not count."""
    lines = [line.rstrip() for line in output.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line.rstrip()).replace(r"\.\.\.", ".*") + r"\n"
        for line in promised
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None


def complaints(steps: list[Step], text: str, mark: str) -> list[str]:
    """A paragraph for each command that failed or printed something else than promised."""
    outputs = read_outputs(text, mark)
    wrong = []
    for number, step in enumerate(steps):
        output, status = outputs.get(number, ("", -1))
        if status != 0 or not is_as_promised(output, step.promised):
            result = "it did not end" if status < 0 else f"exit status {status}, output:\n{output}"
            wrong.append(f"$ {step.command}\n{result}\npromised:\n" + "\n".join(step.promised))
    return wrong


def share_cache(cache: Path, *names: str) -> None:
    """Make an empty cache but for these folders of the user's own: an export takes half a minute, and a first use that
    exports is tested elsewhere."""
    cache.mkdir()
    for name in names:
        own = cache_directory().resolve() / name
        own.mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(own)
