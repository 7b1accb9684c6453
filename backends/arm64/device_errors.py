"""The error for a damaged copy on a device, which can be mended by sending the copy again."""

from __future__ import annotations

from microvlm.errors import UserError

BUNDLE = "bundle"
PACKAGES = "packages"


class DamagedCopyError(UserError):
    """A worker found its bundle altered or could not import its packages. `part`: BUNDLE or PACKAGES."""

    def __init__(self, message: str, part: str):
        super().__init__(message)
        self.part = part
