"""The exception for errors that the user can fix. Command lines print its text alone, without a traceback."""

from __future__ import annotations

from microvlm.escaping import printable


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong and what to do next.

    Control characters become escapes, because a sentence may quote names out of any file.
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended."""
