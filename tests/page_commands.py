"""A page's commands and the output it promises, and whether a shell's output is that.

In a block ```console a line that starts with `$ ` is a command and what follows is its output; there `...` alone stands
for any lines, and inside a line for any text. Commands of one page share one shell.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    command: str
    promised: tuple[str, ...]


def read_steps(page: Path) -> list[Step]:
    """Every command of the page's console blocks, in order. Raises ValueError for output before any command."""
    steps = []
    for block in re.findall(r"(?ms)^```console\n(.*?)^```$", page.read_text()):
        first, *commands = re.split(r"(?m)^\$ ", block)
        if first:
            raise ValueError(f"{page.name} has a console block that starts with output: {first!r}")
        for text in commands:
            command, *promised = text.splitlines()
            steps.append(Step(command, tuple(promised)))
    return steps


def script(steps: list[Step], mark: str) -> str:
    """One shell runs all; before a command comes a line with the mark, after it one with its exit status."""
    parts = []
    for number, step in enumerate(steps):
        parts.append(f"echo {shlex.quote(f'{mark} start {number}')}\n{step.command}\n")
        parts.append(f'ended=$?; echo; echo "{mark} end {number} $ended"\n')
    return "".join(parts)


def read_outputs(text: str, mark: str) -> dict[int, tuple[str, int]]:
    """Number of a step -> (its output, its exit status), for those that ended."""
    found = re.findall(rf"(?ms)^{mark} start (\d+)\n(.*?)\n{mark} end \1 (\d+)$", text)
    return {int(number): (output, int(status)) for number, output, status in found}


def is_as_promised(output: str, promised: tuple[str, ...]) -> bool:
    """Is every line of the output promised, and the other way round? Blanks at a line's end do not count."""
    lines = [line.rstrip() for line in output.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    pattern = "".join(
        r"(?:.*\n)*?" if each.strip() == "..." else re.escape(each.rstrip()).replace(r"\.\.\.", ".*") + r"\n"
        for each in promised
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None


def complaints(steps: list[Step], text: str, mark: str) -> list[str]:
    """What did not go as the page says, one paragraph a command."""
    outputs = read_outputs(text, mark)
    wrong = []
    for number, step in enumerate(steps):
        output, status = outputs.get(number, ("", -1))
        if status != 0 or not is_as_promised(output, step.promised):
            shown = "it did not end" if status < 0 else f"exit status {status}, output:\n{output}"
            wrong.append(f"$ {step.command}\n{shown}\npromised:\n" + "\n".join(step.promised))
    return wrong
