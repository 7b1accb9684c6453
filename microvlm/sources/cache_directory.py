"""The folder in which this package keeps what it makes or downloads once: bundles, emulated machines, packages.

MICROVLM_CACHE names it. What stands in the way of using it is one sentence that names this variable.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from microvlm.errors import UserError
from microvlm.escaping import printable

VARIABLE = "MICROVLM_CACHE"
_REMEDY = f"set {VARIABLE} to a folder that you may write to"


def cache_directory() -> Path:
    """$MICROVLM_CACHE, or microvlm below $XDG_CACHE_HOME or ~/.cache; it may not exist yet, or be read-only.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification says. A relative MICROVLM_CACHE is
    below the working directory. Raises UserError where there is no home, and for a path that is no folder or may not be
    read.
    """
    configured = os.environ.get(VARIABLE)
    folder = Path(os.path.abspath(configured)) if configured else _users_cache() / "microvlm"
    try:
        os.stat(os.path.join(folder, os.curdir))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def writable_cache(*parts: str) -> Path:
    """A folder below `cache_directory`, created, in which files can be made. Raises UserError."""
    folder = cache_directory().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        effective = os.access in os.supports_effective_ids
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def _users_cache() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):
        return Path(configured)
    home = os.path.expanduser("~") if os.environ.get("HOME", "/") else "~"
    if not os.path.isabs(home):
        raise UserError(
            f"this user has no home folder, in which files are kept for the next time: {_REMEDY}."
        )
    return Path(home) / ".cache"


def _unusable(folder: Path, error: OSError) -> UserError:
    place = printable(os.path.normpath(error.filename or folder))
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(
            f"the cache {printable(str(folder))} is not a folder, or lies below a file: {_REMEDY}."
        )
    return UserError(f"the cache cannot be used ({place}: {error.strerror or error}): {_REMEDY}.")
