"""The one progress bar: cells done, cells/s and time left; silent where nobody watches."""

from __future__ import annotations

import sys
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
