"""What is recorded of a run, step by step and epoch by epoch: the rows of its tables."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .task import Place

MOST_ROWS = 20_000  # of steps.csv, about: a longer run has a row for every so many steps
STEP_COLUMNS = ["step", "epoch", "loss", "learning_rate", "gradient_norm", "cells_per_second"]
TIMED_COLUMNS = {"cells_per_second", "seconds"}  # the only ones that differ from run to run


class Recent:
    """Mean loss and speed of the steps since the last row."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._cells, self._start = 0, time.perf_counter()

    def add(self, loss: float, cells: int) -> None:
        self._losses.append(loss)
        self._cells += cells

    def row(self, place: Place, rate: float, norm: float) -> dict[str, Any]:
        """Their row of ``steps.csv``; learning rate and gradient norm are those of the last."""
        return {
            "step": place.step,
            "epoch": place.epoch + 1,
            "loss": float(np.mean(self._losses)),
            "learning_rate": rate,
            "gradient_norm": norm,
            "cells_per_second": self._cells / (time.perf_counter() - self._start),
        }


def best_of(row: dict[str, Any], score: float) -> dict[str, float]:
    """What is remembered of the epoch whose model is kept, by its row of ``epochs.csv``."""
    values = {
        name: float(value)
        for name, value in row.items()
        if value is not None and name not in TIMED_COLUMNS
    }
    return values | {"score": score}
