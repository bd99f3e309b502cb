"""The errors that mean "the user can put this right": the command line prints them as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right; its text is one sentence that says how. Exit code 1."""

    exit_code = 1


class ConfigError(UserError):
    """A configuration that does not fit its scheme: unknown key, wrong type, missing file. Exit code 2, as for usage.

    ``key`` is the dotted key at fault when there is a single one.
    """

    exit_code = 2

    def __init__(self, message: str, key: str | None = None):
        super().__init__(message)
        self.key = key
