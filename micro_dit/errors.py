"""The exception for errors that the user can fix."""

# Config fields of earlier versions, and the reason for their removal.
REMOVED_FIELDS = {"quantize": "8-bit matrix products showed no benefit, see docs/lab_notes.md"}


class UserError(Exception):
    """An error that the user can fix. The message states what is wrong, where, and which flag or command fixes it.

    Commands print the message as one line without a traceback and exit with status 1.
    """


def removed_field(name: str) -> UserError:
    """Returns the error for a config or an override that sets one of REMOVED_FIELDS."""
    return UserError(f"Config field `{name}` was removed ({REMOVED_FIELDS[name]}). Remove --config.{name}.")
