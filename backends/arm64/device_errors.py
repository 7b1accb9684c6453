"""What is wrong with a device's copy, told apart from other errors so that it can be sent again."""

from __future__ import annotations

from microvlm.errors import UserError

BUNDLE = "bundle"
PACKAGES = "packages"


class Damaged(UserError):
    """A worker found its bundle altered or could not import its packages. `what`: BUNDLE or PACKAGES."""

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what
