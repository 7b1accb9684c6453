"""Output and exit status of every command line: one JSON document on stdout, errors as one sentence on stderr.

Exit status: 0 success, 1 a gate or a comparison failed, 2 bad usage or bad input, 130 interrupted. Knows no command.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from microvlm.errors import UserError

GATE_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "huggingface_hub")


def run_click(command: click.Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a click command or group and exit the process with its status.

    A command returns None or its status, and raises UserError for errors that the user can fix. Those, usage errors,
    file system errors and missing packages become one sentence on stderr and status 2. An interrupt gives 130. A closed
    pipe (SIGPIPE) is not an error and gives 0. Any other exception is a defect and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A command may have saved its state before it prints: a character that the terminal's encoding lacks is
        # printed as an escape instead of raising an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_status(command, arguments))


def print_json(document: Any) -> None:
    """Print the JSON document of `--json` on stdout. Raises ValueError for NaN and infinity, which are not JSON."""
    text = json.dumps(document, allow_nan=False, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, allow_nan=False)
    click.echo(text)


def note(message: str) -> None:
    """Print progress or a remark on stderr."""
    click.echo(message, err=True)


def describe_os_error(error: OSError) -> str:
    """Describe a file system error in one sentence."""
    prefix = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in _FULL_DISK:
        return f"{prefix}no space is left on the disk; free some or write elsewhere."
    if error.errno == errno.EFBIG:
        return f"{prefix}the file is larger than the file system or a limit allows; write elsewhere."
    return f"{prefix}{error.strerror or error}."


def _status(command: click.Command, arguments: Sequence[str] | None) -> int:
    stdout = sys.stdout
    name = os.path.basename(sys.argv[0]) if arguments is None else command.name
    try:
        result = command.main(
            args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False
        )
        if sys.stdout is not None:  # None: stdout was closed before the command started
            sys.stdout.flush()
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else name
        return _fail(f"{error.format_message()} (see {path} --help)")
    except click.ClickException as error:
        return _fail(error.format_message())
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(_describe_missing_package(error))
    except (click.Abort, KeyboardInterrupt):
        note("Interrupted.")
        return INTERRUPTED
    except SystemExit:
        # When the reader of stdout closes it during a write, click replaces stdout and exits with status 1.
        if sys.stdout is stdout:
            raise
        _discard_stdout()
        return 0
    except BrokenPipeError:
        _discard_stdout()
        return 0
    except OSError as error:
        _discard_stdout()
        return _fail(describe_os_error(error))
    return result if isinstance(result, int) else 0


def _describe_missing_package(error: ModuleNotFoundError) -> str:
    """Name the extra that installs a missing package. Raises `error` again for a module of microvlm."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "microvlm"):
        raise error
    extra = "export" if package in _EXPORT_PACKAGES else "train"
    return f"this command needs the package '{package}': pip install 'microvlm[{extra}]'."


def _fail(sentence: str) -> int:
    click.echo(f"Error: {sentence}", err=True)
    return BAD_INPUT


def _discard_stdout() -> None:
    # The buffered output cannot be written; without this the interpreter would print an error at exit.
    if sys.__stdout__ is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
