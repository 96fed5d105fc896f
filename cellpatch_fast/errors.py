"""The one exception for input that cannot be used, and the warnings about what can."""

from __future__ import annotations

import sys
import warnings


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


# Of the standard library, but between frames of ours.
BETWEEN = frozenset({"contextlib", "functools"})


def warn(message: str, category: type[Warning] = InputWarning) -> None:
    """Warn, pointing at the line outside of this package that led here.

    (``skip_file_prefixes`` of `warnings.warn` does the same, from Python 3.12 on.)
    """
    package = __name__.partition(".")[0]
    level = 1
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] != package and name not in BETWEEN:
            break
        frame, level = caller, level + 1
    warnings.warn(message, category, stacklevel=level)
