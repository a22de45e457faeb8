"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: one sentence that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with status 1.
    """
