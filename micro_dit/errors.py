"""The one exception that a user is meant to read."""

# Config fields of earlier versions, and why they were removed.
REMOVED_FIELDS = {"quantize": "8-bit products showed no gain, see docs/lab_notes.md"}


class UserError(Exception):
    """Something the user can put right: one sentence that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with status 1.
    """


def removed_field(name: str) -> UserError:
    """Returns the error for a config or an override that sets one of REMOVED_FIELDS."""
    return UserError(f"the config field `{name}` was removed ({REMOVED_FIELDS[name]}); drop --config.{name}.")
