"""The one exception a user's mistake raises."""


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one line that names the value, what is allowed and the remedy; the entry point prints
    it without a traceback and exits with code 2.
    """
