"""Output and exit status of every command line: one JSON document on stdout, errors as one sentence on stderr.

Exit status: 0 success, 1 a gate or a comparison failed, 2 bad usage or bad input, 130 interrupted. Knows no command.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol, TextIO

import click

from microvlm.errors import INTERRUPTED, UserError
from microvlm.escaping import printable_json, printable_lines

GATE_FAILED = 1
BAD_INPUT = 2

_LONGEST_NAME = 300
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "huggingface_hub")
_SERVE_PACKAGES = ("starlette", "uvicorn")


class LiveLine(Protocol):
    """A line of progress that is rewritten on the terminal (`microvlm.terminal.step_progress`)."""

    def give_way(self) -> None:
        """Erase the line, because a note comes; it may come back below."""

    def end(self) -> None:
        """Leave the terminal to other output."""


live_line: LiveLine | None = None
"""The one of this process, once progress was shown."""


class OutputError(Exception):
    """Stdout does not take what a command prints, such as one that is redirected to a full disk."""


def run_click(command: click.Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a click command or group and exit the process with its status.

    A command returns None or its status, and raises UserError for errors that the user can fix. Those, usage errors,
    file system errors, missing packages and lack of memory become one sentence on stderr and status 2, and so does a
    stdout that is full, unless the output was about a change that is saved (`after_saving`). An interrupt gives 130. A
    closed pipe (SIGPIPE) is not an error and gives 0. Any other exception is a defect and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A command may have saved its state before it prints: a character that the terminal's encoding lacks is
        # printed as an escape instead of raising an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _status(command, arguments)
    finally:
        end_live_line()
    sys.exit(status)


def echo(text: str = "", end: str = "\n") -> None:
    """Print text on stdout, at once. Control characters, which a terminal would obey, are printed as escapes.

    Raises OutputError, and BrokenPipeError when the reader of a pipe has left.
    """
    end_live_line()
    try:
        click.echo(printable_lines(text) + end, nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout cannot be written: {describe_os_error(error)}") from None


def print_json(document: Any) -> None:
    """Print the JSON document of `--json` on stdout. Raises ValueError for NaN and infinity, which are not JSON, and
    the errors of `echo`."""
    text = printable_json(json.dumps(document, allow_nan=False, ensure_ascii=False))
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, allow_nan=False)
    echo(text)


@contextmanager
def after_saving() -> Iterator[None]:
    """Within, a command prints about a change that is saved, and a stdout that cannot take it is only a remark.

    The exit status says whether the change was made: a script that repeats a failed command must not make it twice.
    """
    try:
        yield
    except OutputError as error:
        _discard(sys.__stdout__)
        note(f"{str(error).rstrip('.')}; what the command did is saved.")
    except BrokenPipeError:
        _discard(sys.__stdout__)


def end_live_line() -> None:
    """End the moving line of progress, if there is one, before something else draws on the terminal."""
    if live_line is not None:
        live_line.end()


def note(message: str) -> None:
    """Print progress or a remark on stderr. A stderr that is full or closed is no error."""
    if live_line is not None:
        live_line.give_way()
    try:
        click.echo(printable_lines(message), err=True)
    except (OSError, ValueError):
        _discard(sys.__stderr__)


def note_error(error: object) -> None:
    """Print one sentence about an error on stderr, without the middle of a very long one, which quotes its input."""
    text = str(error)
    note(f"Error: {text if len(text) <= 2000 else f'{text[:1500]} … {text[-400:]}'}")


def describe_os_error(error: OSError) -> str:
    """Describe a file system error in one sentence."""
    name = "" if error.filename is None else str(error.filename)
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 2]}…{name[-_LONGEST_NAME // 2 :]}"
    prefix = f"{name}: " if name else ""
    if error.errno in _FULL_DISK:
        return f"{prefix}no space is left on the disk; free some or write elsewhere."
    if error.errno == errno.EFBIG:
        return f"{prefix}the file is larger than the file system or a limit allows; write elsewhere."
    return f"{prefix}{error.strerror or error}."


def _status(command: click.Command, arguments: Sequence[str] | None) -> int:
    stdout = sys.stdout
    name = os.path.basename(sys.argv[0]) if arguments is None else command.name
    # Subcommands take them over.
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    try:
        result = command.main(
            args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False
        )
        if sys.stdout is not None:  # None: stdout was closed before the command started
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return BAD_INPUT
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else name
        return _fail(f"{error.format_message()} (see {path} --help)")
    except click.ClickException as error:
        return _fail(error.format_message())
    except UserError as error:
        return _fail(str(error))
    except OutputError as error:
        _discard(sys.__stdout__)
        return _fail(str(error))
    except MemoryError:
        return _fail("there is not enough memory: end other programs, or give a smaller model or input.")
    except ModuleNotFoundError as error:
        return _fail(_describe_missing_package(error))
    except (click.Abort, KeyboardInterrupt):
        note("Interrupted.")
        return INTERRUPTED
    except SystemExit:
        # When the reader of stdout closes it during a write, click replaces stdout and exits with status 1.
        if sys.stdout is stdout:
            raise
        _discard(sys.__stdout__)
        return 0
    except BrokenPipeError:
        _discard(sys.__stdout__)
        return 0
    except OSError as error:
        _discard(sys.__stdout__)
        return _fail(describe_os_error(error))
    except Exception as error:
        if _is_interrupt(error):
            note("Interrupted.")
            return INTERRUPTED
        raise
    return result if isinstance(result, int) else 0


def _describe_missing_package(error: ModuleNotFoundError) -> str:
    """Name the extra that installs a missing package. Raises `error` again for a module of microvlm."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "microvlm"):
        raise error
    extra = "export" if package in _EXPORT_PACKAGES else "serve" if package in _SERVE_PACKAGES else "train"
    return f"this command needs the package '{package}': pip install 'microvlm[{extra}]'."


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an interrupt is behind an error: the import of a compiled module reports it as an ImportError."""
    for _ in range(100):
        if error is None or isinstance(error, KeyboardInterrupt):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


def _fail(sentence: str) -> int:
    note_error(sentence)
    return BAD_INPUT


def _discard(stream: TextIO | None) -> None:
    """Let what the stream still holds, and what follows, go nowhere: writing it at exit would be an error."""
    if stream is None:
        return
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
