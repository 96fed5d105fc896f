"""The training loop: what pretraining and fine-tuning share.

A `Task` says what the loss of some cells is and how validation goes; `train` makes steps of it. The
decisions:

- **A batch is a step**, whatever the number of devices and parts it is computed in. The loss is the
  mean over all that the batch predicts: each part contributes its *sum*, divided by the number of
  the whole batch, so parts of different sizes weigh what they should.
- **Random numbers are a function of (seed, step, rank)**: the generator is seeded before each step.
  So a run that goes on needs no random state from before, nothing that happens between two steps
  (validation, a picture) changes the next, and an interrupted run ends with the bits of an
  uninterrupted one.
- **Nothing is learnt from a loss that is not finite**: the step is not taken, and the error names
  the step and the parameter.
- **The model that is kept** is the one that does best on the validation cells, or the last one
  where there are none, or where the settings say so.
- **Only gene rows that the data have are trained**, see `occurring`: the model, the optimiser and
  the checkpoint hold these meanwhile; what is saved has all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..embedding import memory_errors
from ..errors import InputError
from ..loader import CellBatch
from ..model import CellPatch
from ..progress import Pace, progress_bar
from .distributed import Processes
from .folder import EPOCHS, STEPS, RunFolder
from .occurring import OccurringGenes
from .settings import TrainingSettings
from .task import History, Place, Task, describe_epoch

logger = logging.getLogger("cellpatch_fast")

MOST_ROWS = 20_000  # of steps.csv, about: a longer run has a row for every so many steps
STEP_COLUMNS = ["step", "epoch", "loss", "learning_rate", "gradient_norm", "cells_per_second"]
TIMED_COLUMNS = {"cells_per_second", "seconds"}  # the only ones that differ from run to run


class _Losses(nn.Module):
    """A task's loss as the forward of a module, as DistributedDataParallel and compile need it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._loss = task.loss

    def forward(self, part: Any) -> Tensor:
        return self._loss(part)


class Trainer:
    """Trains a task and keeps its folder up to date.

    Parameters
    ----------
    task, settings
        What to train, and how.
    processes
        This process and its device.
    folder
        The run's folder in the leading process; None in the others.
    checkpoint
        Of this run, to go on from; None to begin.
    checkpoint_minutes
        A checkpoint is written after each epoch, and whenever so much time has passed.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainingSettings,
        processes: Processes,
        folder: RunFolder | None,
        checkpoint: dict[str, Any] | None,
        *,
        checkpoint_minutes: float = 10.0,
    ) -> None:
        self.task, self.settings, self.processes, self.folder = task, settings, processes, folder
        self.place = Place()
        self.best: dict[str, float] = {}
        self._checkpoint_seconds = 60 * checkpoint_minutes
        self._genes = OccurringGenes(task.model, task.training.streams)
        optimizer = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        self._optimizer = optimizer(
            _groups(task.model, settings),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if checkpoint is not None:
            self._restore(checkpoint)
        self._losses: Any = _Losses(task)
        if settings.compile:
            self._losses.compile(dynamic=True)
        self._replica: nn.Module = self._losses
        if processes.world_size > 1:
            self._replica = DistributedDataParallel(self._losses, broadcast_buffers=False)
        self._steps_per_epoch = len(task.training)
        self._log_steps = -(-self._steps_per_epoch * settings.epochs // MOST_ROWS)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        try:
            self.task.model.load_state_dict(checkpoint["model"])
            self._optimizer.load_state_dict(checkpoint["optimizer"])
            self.place = Place(**checkpoint["place"])
            self.best = dict(checkpoint["best"])
            threads = int(checkpoint["threads"])
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"the checkpoint of this run does not fit its model ({error}): begin anew with "
                "--overwrite (overwrite=True)"
            ) from error
        if self.processes.device.type == "cpu" and threads != torch.get_num_threads():
            logger.warning(
                "the run was interrupted with %d threads and goes on with %d: the last bits of its "
                "weights can differ from those of an uninterrupted run (OMP_NUM_THREADS=%d keeps "
                "them)",
                *(threads, torch.get_num_threads(), threads),
            )

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.place.epoch >= self.settings.epochs or self._stale

    @property
    def _stale(self) -> bool:
        return 0 < self.settings.patience <= self.place.stale

    def run(self, progress: bool | None = None) -> History:
        """Train until the last epoch, or until nothing improves.

        Raises
        ------
        InputError
            If a loss is not finite, or no cell has anything to learn from.
        """
        cells, epochs = self._cells_per_epoch, self.settings.epochs
        first = self.place.epoch * cells + self.place.batch * self.settings.batch_size
        pace = Pace(first / cells)
        if not self.processes.leads:
            progress = False
        with (
            progress_bar(epochs * cells, "training", progress, done=first) as bar,
            _deterministic(self.settings.deterministic),
        ):
            while not self.finished:
                self._train_epoch(bar)
                row = self._end_epoch()
                if self.processes.leads:
                    left = None if self.finished else pace.seconds_to(epochs, self.place.epoch)
                    logger.info("%s", describe_epoch(row, self.settings, left))
        self._genes.restore(self._left)
        return History(
            epochs=self.place.epoch,
            steps=self.place.step,
            best_epoch=int(self.best.get("epoch", 0)),
            best={n: value for n, value in self.best.items() if n not in ("epoch", "score")},
            stopped_early=self.place.epoch < self.settings.epochs,
        )

    @property
    def _cells_per_epoch(self) -> int:
        return self._steps_per_epoch * self.settings.batch_size

    def _train_epoch(self, bar: Any) -> None:
        """The rest of the epoch that the run stands in."""
        place, loader = self.place, self.task.training
        loader.epoch, loader.first_batch = place.epoch, place.batch
        self.task.train()
        recent = _Recent()
        saved = time.perf_counter()
        with contextlib.closing(iter(loader)) as batches:
            for batch in batches:
                with memory_errors():
                    loss, norm = self._step(self._genes.narrow(batch))
                place.batch += 1
                place.step += 1
                cells = min(self.settings.batch_size, len(batch.rows) * self.processes.world_size)
                recent.add(loss, cells)
                epoch = f"{place.epoch + 1} of {self.settings.epochs}"
                bar.set_postfix(epoch=epoch, loss=f"{loss:.4f}", refresh=False)
                bar.update(cells)
                if place.step % self._log_steps == 0 and self.folder is not None:
                    self.folder.add_row(STEPS, self._row(recent, norm))
                    recent = _Recent()
                if time.perf_counter() - saved >= self._checkpoint_seconds:
                    place.seconds += time.perf_counter() - saved
                    self._save()
                    saved = time.perf_counter()
        place.seconds += time.perf_counter() - saved

    def _rate(self, step: int) -> float:
        return self.settings.rate(step, self._steps_per_epoch * self.settings.epochs)

    def _row(self, recent: _Recent, norm: float) -> dict[str, Any]:
        place = self.place
        return {
            "step": place.step,
            "epoch": place.epoch + 1,
            "loss": recent.loss,
            "learning_rate": self._rate(place.step - 1),
            "gradient_norm": norm,
            "cells_per_second": recent.speed,
        }

    def _step(self, batch: CellBatch) -> tuple[float, float]:
        """One step of the optimiser; returns the batch's loss and its gradient's norm."""
        settings, place, task = self.settings, self.place, self.task
        torch.manual_seed(step_seed(settings.seed, place.step, self.processes.rank))
        total = float(self.processes.sum([task.targets(batch)])[0])
        self._optimizer.zero_grad()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for part, synchronise in _with_last(task.parts(batch, settings.accumulate)):
            with self._synchronised(synchronise):
                with self._autocast():
                    loss = self._replica(part)
                # DistributedDataParallel takes the mean over processes, but sums are wanted
                (loss * (self.processes.world_size / max(total, 1))).backward()
            loss_sum += loss.detach()
        weights = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradient_norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        total_loss = float(self.processes.sum([float(loss_sum)])[0])
        mean, norm = total_loss / max(total, 1), float(gradient_norm)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise InputError(self._not_finite(mean))
        if settings.gradient_clip:
            nn.utils.clip_grads_with_norm_(weights, settings.gradient_clip, gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(place.step) * group["times"]
        self._optimizer.step()
        place.loss_sum += total_loss
        place.targets += total
        return mean, norm

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.processes.device.type, torch.bfloat16)

    def _synchronised(self, now: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over processes with the last part of a batch."""
        if now or not isinstance(self._replica, DistributedDataParallel):
            return nullcontext()
        return self._replica.no_sync()

    def _not_finite(self, loss: float) -> str:
        """What to say of a loss or gradient that is not finite."""
        named: list[tuple[str, Tensor]] = [
            (f"parameter {name}", p) for name, p in self.task.model.named_parameters()
        ]
        named += [
            (f"gradient of {name}", p.grad)
            for name, p in self.task.model.named_parameters()
            if p.grad is not None
        ]
        culprits = (name for name, tensor in named if not tensor.isfinite().all())
        what = f"the {next(culprits, 'sum')} is not finite"
        return (
            f"the loss is {loss} at step {self.place.step + 1} (epoch {self.place.epoch + 1}): "
            f"{what}. The step was not taken. A lower learning rate or a smaller gradient clip "
            "often helps; the last checkpoint is as it was"
        )

    def _end_epoch(self) -> dict[str, Any]:
        """Validate, keep the best model, and write what is to be known of the epoch: its row."""
        place = self.place
        if not place.targets:
            raise InputError(
                "no cell has anything to learn from: all are empty, or have too few known genes"
            )
        found = self._validate()
        place.epoch += 1
        row = {
            "epoch": place.epoch,
            "step": place.step,
            "training_loss": place.loss_sum / place.targets,
            **{f"validation_{name}": found.get(name) for name in ("loss", *self.task.measures)},
            "learning_rate": self._rate(place.step - 1),
            "seconds": place.seconds,
        }
        score = self.task.score(found) if found else math.inf
        better = not found or score > self.best.get("score", -math.inf)
        improved = better or not self.settings.keep_best
        place.stale = 0 if better else place.stale + 1
        if improved:
            self.best = {
                name: float(value)
                for name, value in row.items()
                if value is not None and name not in TIMED_COLUMNS
            } | {"score": score}
        place.batch, place.loss_sum, place.targets = 0, 0.0, 0.0
        if self.folder is not None:
            self.folder.add_row(EPOCHS, row)
            if improved:
                with self._genes.whole(self._left):
                    self.task.model.save_pretrained(self.folder.path)
        self._save()
        return row

    @property
    def _left(self) -> float:
        """What decay has left by now of a gene row that no cell has."""
        settings = self.settings
        trained = self.task.model.gene_embedding.weight.requires_grad
        if settings.optimizer != "adamw" or not trained:
            return 1.0
        rates = np.array([self._rate(step) for step in range(self.place.step)])
        return float(np.prod(1 - rates * settings.gene_rate * settings.weight_decay))

    def _validate(self) -> dict[str, float]:
        """How the model does on the validation cells; nothing where there are none."""
        loader = self.task.validation
        if loader is None:
            return {}
        loader.epoch = 0  # the same masks each time
        self.task.model.eval()
        sums: np.ndarray | float = 0.0
        with contextlib.closing(iter(loader)) as batches, torch.inference_mode(), memory_errors():
            for batch in batches:
                sums = sums + self.task.tally(self._genes.narrow(batch))
        return self.task.summarise(self.processes.sum(np.atleast_1d(sums)))

    def _save(self) -> None:
        if self.folder is not None:
            self.folder.save(
                {
                    "model": self.task.model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "place": dataclasses.asdict(self.place),
                    "best": self.best,
                    "threads": torch.get_num_threads(),  # sums are split by it
                    "finished": self.finished,
                }
            )


class _Recent:
    """Mean loss and speed of the steps since the last row."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._cells, self._start = 0, time.perf_counter()

    def add(self, loss: float, cells: int) -> None:
        self._losses.append(loss)
        self._cells += cells

    @property
    def loss(self) -> float:
        return float(np.mean(self._losses))

    @property
    def speed(self) -> float:
        return self._cells / (time.perf_counter() - self._start)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of PyTorch's generators for a step, another one for every step and process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _with_last(items: Iterator[Any]) -> Generator[tuple[Any, bool]]:
    """Each item, and whether it is the last."""
    before = next(items)
    for item in items:
        yield before, False
        before = item
    yield before, True


def _groups(model: CellPatch, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The optimiser's groups: weights to train, and ``times``, their learning rate's multiple."""
    encoder = model.encoder_state().keys()
    groups: dict[float, list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        times = 1.0
        if name == "gene_embedding.weight":
            times = settings.gene_rate
        elif name in encoder:
            times = settings.encoder_rate
        if weight.requires_grad:
            groups.setdefault(times, []).append(weight)
    return [{"params": weights, "times": times} for times, weights in groups.items()]


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    if wanted:  # else cuBLAS, which reads this when it is first used, is refused
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
