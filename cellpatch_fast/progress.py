"""The one progress bar: cells done, cells/s and time left; silent where nobody watches.

For log lines, `Pace` and `duration` say how much time is left.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, what: str, show: bool | None, done: int = 0) -> tqdm:
    """A tqdm bar over cells, on stderr.

    ``show`` None means only if stderr is a terminal. ``done`` cells count as finished before
    the start and not in the speed.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=" cells",
        unit_scale=True,
        smoothing=0.1,
        disable=not (sys.stderr.isatty() if show is None else show),
    )


class Pace:
    """How fast this run is, whatever an interrupted one before it has done.

    Parameters
    ----------
    done
        How much was done before its start, in any unit.
    """

    def __init__(self, done: float) -> None:
        self._before, self._started = done, time.perf_counter()

    def seconds_to(self, total: float, done: float) -> float | None:
        """Until ``total`` is done, as fast as until now; None if this run has done nothing."""
        if done <= self._before:
            return None
        return (time.perf_counter() - self._started) * (total - done) / (done - self._before)


def duration(seconds: float) -> str:
    """As exact as an estimate is: 40 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size, most, digits in (("s", 1, 90, 0), ("min", 60, 90, 0), ("h", 3600, 48, 1)):
        if (number := round(seconds / size, digits)) < most:
            return f"{number:.{digits}f} {unit}"
    return f"{seconds / 86_400:.1f} days"
