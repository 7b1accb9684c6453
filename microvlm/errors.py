"""The one exception that means "the user can mend this": its text is shown alone, without a traceback."""


class UserError(Exception):
    """Bad input. The message is one sentence: what was wrong and what to do next."""
