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
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..devices import memory_errors
from ..errors import InputError
from ..loading import CellBatch
from ..progress import Pace, progress_bar
from .distributed import Processes
from .folder import EPOCHS, STEPS, RunFolder
from .occurring import OccurringGenes
from .optimizing import first_not_finite, make_optimizer, untrained_rows_left
from .records import MOST_ROWS, Recent, best_of
from .repeating import deterministic, step_seed
from .settings import TrainingSettings
from .task import History, Place, Task, describe_epoch

logger = logging.getLogger("cellpatch_fast")


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
        self._optimizer = make_optimizer(task.model, settings)
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
                threads,
                torch.get_num_threads(),
                threads,
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
            deterministic(self.settings.deterministic),
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
        recent = Recent()
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
                    rate = self._rate(place.step - 1)
                    self.folder.add_row(STEPS, recent.row(place, rate, norm))
                    recent = Recent()
                if time.perf_counter() - saved >= self._checkpoint_seconds:
                    place.seconds += time.perf_counter() - saved
                    self._save()
                    saved = time.perf_counter()
        place.seconds += time.perf_counter() - saved

    def _rate(self, step: int) -> float:
        return self.settings.rate(step, self._steps_per_epoch * self.settings.epochs)

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
        culprit = first_not_finite(self.task.model)
        return (
            f"the loss is {loss} at step {self.place.step + 1} (epoch {self.place.epoch + 1}): "
            f"the {culprit} is not finite. The step was not taken. A lower learning rate or a "
            "smaller gradient clip often helps; the last checkpoint is as it was"
        )

    def _end_epoch(self) -> dict[str, Any]:
        """Validate, keep the best model, and write what is to be known of the epoch: its row."""
        place = self.place
        if not place.targets:
            raise InputError(
                "no cell has anything to learn from: all are empty, or have too few known genes"
            )
        validated = self._validate()
        place.epoch += 1
        row = {
            "epoch": place.epoch,
            "step": place.step,
            "training_loss": place.loss_sum / place.targets,
            **{f"validation_{name}": validated.get(name) for name in ("loss", *self.task.measures)},
            "learning_rate": self._rate(place.step - 1),
            "seconds": place.seconds,
        }
        score = self.task.score(validated) if validated else math.inf
        better = not validated or score > self.best.get("score", -math.inf)
        improved = better or not self.settings.keep_best
        place.stale = 0 if better else place.stale + 1
        if improved:
            self.best = best_of(row, score)
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
        rates = map(self._rate, range(self.place.step))
        return untrained_rows_left(self.task.model, self.settings, rates)

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


def _with_last(items: Iterator[Any]) -> Generator[tuple[Any, bool]]:
    """Each item, and whether it is the last."""
    before = next(items)
    for item in items:
        yield before, False
        before = item
    yield before, True
