"""Shows pictures in a terminal that can show them, and a line with name and size in one that cannot.

What the terminal can do is read from its environment variables: asking the terminal itself would take away what the
user types meanwhile. Pictures go to stderr, so that stdout holds answers only.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import click

from microvlm.console import end_live_line, note
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.terminal.answer_line import is_terminal

Kind = Literal["kitty", "iterm2", "sixel", "blocks", "line"]
VARIABLE = "MICROVLM_PICTURES"
"""Names the kind for a terminal that is not recognised."""
_FIRST_KONSOLE = 220400
"""The first version of Konsole with kitty's protocol."""
_CELL_PX = (10, 20)
"""Pixels of a cell, about: the size in which a picture is sent."""
_MOST_CELLS = (48, 20)
"""Columns and rows of a photograph; a drawn sheet may take the whole terminal."""
_FREE_ROWS = 3
"""Rows of the terminal that stay for the command and its answer."""


def kind_of(environment: Mapping[str, str]) -> Kind:
    """How a terminal with these environment variables shows pictures. Raises UserError for an unknown kind."""
    named = environment.get(VARIABLE)
    if named:
        if named not in get_args(Kind):
            raise UserError(f"{VARIABLE} is '{printable(named)}'; give one of {', '.join(get_args(Kind))}.")
        return named  # type: ignore[return-value]
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    # A multiplexer draws cells of its own, and lets no picture through.
    if "TMUX" not in environment and not term.startswith(("screen", "tmux")):
        konsole = environment.get("KONSOLE_VERSION", "")
        if (
            "KITTY_WINDOW_ID" in environment
            or term in ("xterm-kitty", "xterm-ghostty")
            or (konsole.isdecimal() and int(konsole) >= _FIRST_KONSOLE)
        ):
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
        if term.startswith(("foot", "mlterm", "yaft")) or "sixel" in term:
            return "sixel"
    has_colours = environment.get("COLORTERM") in ("truecolor", "24bit") or term.endswith("-direct")
    return "blocks" if has_colours and not environment.get("NO_COLOR") else "line"


def open_pictures(show: bool | None) -> Pictures | None:
    """Where a command shows pictures, None for nowhere. `show` None: on a terminal. Raises UserError as `kind_of`."""
    if show is False:
        return None
    if is_terminal(sys.stdout) and is_terminal(sys.stderr):
        kind = kind_of(os.environ)
        can_write_blocks = "utf" in (sys.stderr.encoding or "").lower()
        return Pictures("line" if kind == "blocks" and not can_write_blocks else kind)
    return Pictures("line") if show else None


class Pictures:
    """Shows picture files on stderr in one way."""

    def __init__(self, kind: Kind):
        self.kind = kind

    def show(self, path: str | Path, is_sheet: bool = False) -> None:
        """Show a picture file; `is_sheet`: one that we drew, with text in it. Raises UserError for a bad picture."""
        from microvlm.inputs.images import load_scaled, size_of_file

        end_live_line()
        width, height = size_of_file(path)
        if self.kind == "line":
            note(f"{printable(str(path))}: {width} x {height} pixels")
            return
        from microvlm.terminal import picture_codes

        columns, rows = self._cells(is_sheet)
        image = load_scaled(path, max(columns * _CELL_PX[0], rows * _CELL_PX[1]))
        # Of the picture as it is upright, which the file's numbers need not say.
        columns, rows = cells_of(image.width, image.height, columns, rows)
        if self.kind == "blocks":
            _write(picture_codes.half_blocks(image, columns, rows))
            return
        image = image.resize((columns * _CELL_PX[0], rows * _CELL_PX[1]))
        if self.kind == "sixel":
            _write(picture_codes.sixel(image))
        else:
            _write(
                (picture_codes.kitty if self.kind == "kitty" else picture_codes.iterm2)(image, columns, rows)
            )

    @staticmethod
    def _cells(is_sheet: bool) -> tuple[int, int]:
        """The most columns and rows that a picture may take."""
        columns, lines = shutil.get_terminal_size()
        room = max(1, columns - 1), max(1, lines - _FREE_ROWS)
        return room if is_sheet else (min(_MOST_CELLS[0], room[0]), min(_MOST_CELLS[1], room[1]))


def cells_of(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """The largest box of cells in columns x rows with the shape of width x height pixels; a cell is twice as high as
    wide."""
    scale = min(columns / width, 2 * rows / height)
    return max(1, round(width * scale)), max(1, round(height * scale / 2))


def _write(codes: str) -> None:
    """Write on stderr. A stderr that is closed is no error."""
    try:
        click.echo(codes, nl=False, err=True)
    except (OSError, ValueError):
        note("")  # which leaves stderr to the null device
