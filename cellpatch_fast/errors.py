"""The one exception for input that cannot be used, and the warnings about what can."""

from __future__ import annotations


class InputError(ValueError):
    """What was found, where, and what to do about it.

    The command line prints its message without a traceback; Python code sees a ValueError.
    """


class InputWarning(UserWarning):
    """Input that can be used, but that someone should look at."""
