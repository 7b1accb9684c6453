"""The exception for errors that the user can fix. Command lines print its text alone, without a traceback."""


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong and what to do next."""


INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended."""
