"""What is trained: a task, and where its run stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..loading import CellBatch, CellLoader
from ..model import CellPatch
from ..progress import duration
from .settings import TrainingSettings


class Task(ABC):
    """What is trained, and on what.

    Attributes
    ----------
    model
        The model; its parameters with ``requires_grad`` are trained.
    training, validation
        Loaders of the cells; ``validation`` is None where there are none.
    """

    model: CellPatch
    training: CellLoader
    validation: CellLoader | None
    measures: tuple[str, ...]  # beside the loss, of validation

    def train(self) -> None:
        """Put the model into training mode."""
        self.model.train()

    @abstractmethod
    def targets(self, batch: CellBatch) -> int:
        """Number of predictions of a batch, over which its loss is the mean."""

    @abstractmethod
    def parts(self, batch: CellBatch, number: int) -> Iterator[Any]:
        """A batch in ``number`` parts, arguments of `loss`."""

    @abstractmethod
    def loss(self, part: Any) -> Tensor:
        """Sum of the losses of a part's predictions."""

    @abstractmethod
    def tally(self, batch: CellBatch) -> np.ndarray:
        """float64 sums over a validation batch, which are added over batches and processes."""

    @abstractmethod
    def summarise(self, sums: np.ndarray) -> dict[str, float]:
        """``loss`` and `measures` from sums of `tally`."""

    @abstractmethod
    def score(self, results: dict[str, float]) -> float:
        """How good a model is, by what `summarise` found: the best one is kept."""


@dataclass
class Place:
    """Where a run stands.

    Parameters
    ----------
    epoch, batch
        The next batch, within its epoch.
    step
        Steps that were made.
    loss_sum, targets
        Of the epoch so far: sum of losses, and number of predictions.
    stale
        Epochs since the best one.
    seconds
        That training took so far.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    targets: float = 0.0
    stale: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class History:
    """What a run came to.

    Parameters
    ----------
    epochs, steps
        That were made, by earlier runs in the same folder too.
    best_epoch, best
        The epoch, from 1, whose model was kept, and its row of ``epochs.csv``.
    stopped_early
        Whether it ended because nothing improved any more.
    """

    epochs: int
    steps: int
    best_epoch: int
    best: dict[str, float]
    stopped_early: bool


def ranges_of(number: int, parts: int) -> list[tuple[int, int]]:
    """``number`` things in equal parts, as ranges; parts may be empty."""
    return [(number * i // parts, number * (i + 1) // parts) for i in range(parts)]


def describe_epoch(row: dict[str, Any], settings: TrainingSettings, left: float | None) -> str:
    """A row of ``epochs.csv`` in words, and the seconds that are ``left``, where that is known."""
    shown = {
        name: value
        for name, value in row.items()
        if value is not None and name not in ("epoch", "step", "learning_rate", "seconds")
    }
    numbers = ", ".join(
        f"{name.replace('_', ' ').replace(' f1', ' F1')} {value:.4f}"
        for name, value in shown.items()
    )
    first, *others = numbers.split("validation ")  # said once
    numbers = f"{first}validation {''.join(others)}" if others else first
    times = f"{row['seconds']:,.0f} s"
    if left is not None:
        times += f", {'at most ' if settings.patience else ''}about {duration(left)} left"
    return f"epoch {row['epoch']} of {settings.epochs}: {numbers} ({times})"
