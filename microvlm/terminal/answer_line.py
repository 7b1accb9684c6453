"""Shows an answer on a terminal while the model chooses its tokens. Knows no model.

A calibrated model may decline its own words at their end. Until then they are shown faint and on one line, which the
answer replaces.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from typing import Protocol, TextIO

import click

from microvlm.console import echo
from microvlm.escaping import printable_lines

_FAINT, _PLAIN, _ERASE_LINE = "\033[2m", "\033[0m", "\r\033[K"


class TokenStream(Protocol):
    """`Processor.stream()`: tokens in, text out as soon as its characters are whole."""

    def feed(self, token: int) -> str: ...


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads `stream` on a terminal that can erase a line."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def cell_width(text: str) -> int:
    """Cells of a terminal that a line of text takes, at most: East Asian characters and emoji take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


class AnswerLine:
    """One answer on stdout, after `prefix`. `is_final`: the answer is the tokens' text and nothing else."""

    def __init__(self, tokens: TokenStream, prefix: str, is_final: bool):
        self._tokens, self._prefix, self._is_final = tokens, prefix, is_final
        self._text, self._shown = "", ""
        self._is_open = False
        # The last column stays free: some terminals go to the next line behind it.
        self._cells = shutil.get_terminal_size().columns - 1

    @classmethod
    def on_terminal(cls, tokens: TokenStream, prefix: str, is_final: bool) -> AnswerLine | None:
        """None where stdout is no terminal: an answer is then printed whole."""
        return cls(tokens, prefix, is_final) if is_terminal(sys.stdout) else None

    def feed(self, row: int, token: int) -> None:
        """Show a token of the answer; an `OnToken` of the decode loop."""
        self._text += self._tokens.feed(token)
        # An answer has no blanks around it, and of those at the end it is not known yet whether they are.
        text = self._text.strip()
        if text == self._shown:
            return
        if self._is_final:
            self._write(printable_lines(text[len(self._shown) :]))
        else:
            line = printable_lines(text)
            if "\n" in line or "\t" in line or cell_width(self._prefix + line) > self._cells:
                return
            self._write(f"{_FAINT}{printable_lines(text[len(self._shown) :])}{_PLAIN}")
        self._shown = text

    def finish(self, answer: str) -> None:
        """End the line with the answer, in place of what was shown."""
        if self._is_final and answer.startswith(self._shown):
            self._write("")
            echo(answer[len(self._shown) :])
        else:
            self._write(_ERASE_LINE if self._is_open and not self._is_final else "")
            echo(f"{self._prefix if not self._is_final else ''}{answer}")
        self._is_open = False

    def close(self) -> None:
        """End a line whose answer does not come."""
        if self._is_open:
            echo()
        self._is_open = False

    def _write(self, text: str) -> None:
        """Write text that is safe for a terminal, at once, after the prefix."""
        if not self._is_open:
            click.echo(self._prefix, nl=False)
            self._is_open = True
        click.echo(text, nl=False)
