"""From a task to a finished run: its folder, its processes, and where it goes on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..kernels import resolve_backend
from .distributed import Processes
from .folder import (
    CHECKPOINT,
    EPOCHS,
    STEPS,
    RunFolder,
    read_checkpoint,
    require_run_folder,
    require_same_run,
)
from .loop import Trainer
from .records import STEP_COLUMNS
from .settings import TrainingSettings
from .task import History, Task

logger = logging.getLogger("cellpatch_fast")


@dataclass(frozen=True)
class Running:
    """How a run is done; changes nothing of its result.

    Parameters
    ----------
    output
        The run's folder.
    overwrite
        Begin anew where there is a run already.
    checkpoint_minutes
        Time between checkpoints within an epoch.
    progress
        Show a progress bar; None for only on a terminal.
    """

    output: Path
    overwrite: bool = False
    checkpoint_minutes: float = 10.0
    progress: bool | None = None


@contextlib.contextmanager
def seeded(seed: int, processes: Processes) -> Iterator[None]:
    """PyTorch's generators start from ``seed``, and are what they were afterwards."""
    device = processes.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def require_possible(
    output: Path, model: object, settings: TrainingSettings, processes: Processes
) -> None:
    """Refuse a folder or a backend that cannot be used, before inputs are read.

    ``model`` is what training starts from; a run that has it in its own folder would replace it,
    and could not be repeated.

    Raises
    ------
    InputError
        Which of them, and why.
    """
    if processes.leads:  # the others would see its files in the making
        require_run_folder(output)
    place = Path(model) if isinstance(model, str | os.PathLike) else None
    if place is not None and place.exists() and output.exists() and place.samefile(output):
        raise InputError(
            f"{output} holds the model to start from, which training would replace: choose "
            "another --output"
        )
    try:
        resolve_backend(settings.backend, processes.device)
    except ValueError as error:
        raise InputError(str(error)) from error
    if settings.precision != "float32" and processes.device.type == "cpu":
        raise InputError(
            f"precision {settings.precision} is for GPUs: on a CPU all is computed in float32"
        )


def require_resumable(
    kind: str,
    settings: TrainingSettings,
    identity: Mapping[str, Any],
    processes: Processes,
    running: Running,
) -> None:
    """Refuse a folder that holds another run, before anything is computed for this one.

    The parameters are those of `run_task`, which looks again: by then the folder is held.
    """
    if processes.leads and not running.overwrite:
        whole = {**identity, **settings.to_dict()}
        require_same_run(running.output, kind, whole, _free(settings))


def _free(settings: TrainingSettings) -> tuple[str, ...]:
    """Settings that may change: a run whose schedule has no end may be made longer, or shorter."""
    return ("epochs",) if settings.schedule == "constant" else ()


def run_task(
    task: Task,
    kind: str,
    settings: TrainingSettings,
    identity: Mapping[str, Any],
    processes: Processes,
    running: Running,
) -> History:
    """Train a task in its folder, from the beginning or from where an earlier run was interrupted.

    Parameters
    ----------
    task, settings, processes, running
        What to train, and how.
    kind
        ``"pretraining"`` or ``"fine-tuning"``.
    identity
        All that the result depends on besides ``settings``, JSON values.

    Raises
    ------
    InputError
        If the folder cannot be used, or training fails.
    """
    validated = [f"validation_{name}" for name in ("loss", *task.measures)]
    columns = {
        STEPS: STEP_COLUMNS,
        EPOCHS: ["epoch", "step", "training_loss", *validated, "learning_rate", "seconds"],
    }
    with contextlib.ExitStack() as stack:
        folder = checkpoint = None
        if processes.leads:
            folder = stack.enter_context(
                RunFolder(
                    running.output,
                    kind,
                    {**identity, **settings.to_dict()},
                    columns,
                    free=_free(settings),
                    overwrite=running.overwrite,
                )
            )
            checkpoint = folder.checkpoint
        processes.wait()  # until the leading process has cleared away what is begun anew
        if not processes.leads and (running.output / CHECKPOINT).exists():
            checkpoint = read_checkpoint(running.output / CHECKPOINT, kind)
        trainer = Trainer(
            task=task,
            settings=settings,
            processes=processes,
            folder=folder,
            checkpoint=checkpoint,
            checkpoint_minutes=running.checkpoint_minutes,
        )
        if processes.leads and trainer.finished:
            logger.info("%s is finished already: nothing to do", running.output)
        elif processes.leads and trainer.place.step:
            logger.info("%s: goes on after step %d", running.output, trainer.place.step)
        history = trainer.run(running.progress)
        processes.wait()  # until what was written can be read
    return history
