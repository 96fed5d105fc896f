"""From the tables in a run's folder to a figure of how it went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..plots.curves import draw_curves
from ..plots.figures import finish
from .folder import EPOCHS, STEPS, read_settings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def training_curves(
    run: str | Path,
    *,
    ax: Axes | None = None,
    save: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """The figure that `cellpatch_fast.pl.training_curves` describes."""
    steps = _read_table(Path(run) / STEPS, ["step", "loss"])
    epochs = _read_table(Path(run) / EPOCHS, ["epoch", "step", "training_loss"])
    epochs = epochs.dropna(axis="columns", how="all")  # no validation: no numbers
    if steps.empty:
        raise InputError(f"{run} has no step to draw yet: wait until {STEPS} has a row")
    figure = draw_curves(steps, epochs, mark_best=_keeps_best(Path(run)), ax=ax, show=show)
    return finish(figure, save, show)


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """The complete rows of a run's table."""
    import pandas as pd

    try:
        table = pd.read_csv(path)
        numbers = table.astype(float)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of a training run: {error}") from error
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"{path} is no table of a training run: it lacks {', '.join(missing)}")
    return numbers.dropna(subset=columns)


def _keeps_best(run: Path) -> bool:
    """Whether the run keeps its best epoch's model; one that does not say so does."""
    try:
        return bool(read_settings(run)["settings"].get("keep_best", True))
    except InputError:
        return True
