"""The one exception for input that cannot be used, and the warnings about what can."""

from __future__ import annotations


class InputError(ValueError):
    """What was found, where, and what to do about it.

    The command line prints its message without a traceback; Python code sees a ValueError.
    """


class InputWarning(UserWarning):
    """Input that can be used, but that someone should look at."""


def summary(error: Exception) -> str:
    """One line about ``error``: its type says what a bare KeyError message does not."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
