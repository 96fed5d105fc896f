"""How many examples hypothesis tries: as many as a test says, or more where that is asked for.

The profile ``ci`` is the default. ``thorough`` tries ten times as many: CELLPATCH_TESTS=thorough in
the environment, or ``pytest --hypothesis-profile thorough``. No example has a deadline: a busy
machine is no fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import settings

CI = 100  # hypothesis' own number of examples, of a test that says none


def load_profile() -> None:
    """To be called before any test is imported, which says how many examples it wants."""
    settings.register_profile("ci", deadline=None, max_examples=CI)
    settings.register_profile("thorough", deadline=None, max_examples=10 * CI)
    settings.load_profile(os.environ.get("CELLPATCH_TESTS", "ci"))


def examples(number: int) -> Callable[[Any], Any]:
    """Decorates a test that tries so many examples in the profile ``ci``."""
    return settings(max_examples=number * settings().max_examples // CI)
