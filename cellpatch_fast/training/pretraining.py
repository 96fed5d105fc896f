"""Pretraining by masked gene modelling: hide genes of a cell, and learn to tell their values.

`masking` says what is hidden; the encoder sees the rest, the decoder predicts the hidden values and
the 0 of some genes that are not expressed. The loss is the mean squared error over these alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cells import RaggedCells
from ..config import CellPatchConfig, Reading
from ..errors import InputError
from ..loading import CellBatch, CellLoader
from ..model import CellPatch, MaskedGeneModel, fingerprint
from .choosing import choose, complete, new_config
from .data import describe, opened, report, split_blocks
from .distributed import Processes
from .expression import gather
from .running import Running, require_possible, require_resumable, run_task, seeded
from .settings import PretrainingSettings
from .starting import begin, learn_new_genes, loader_options, starting_model
from .task import History, Task, ranges_of

if TYPE_CHECKING:
    from ..config import Expected
    from ..genes import GeneVocabulary

logger = logging.getLogger("cellpatch_fast")

KIND = "pretraining"


def pretrain(
    data: Any,
    output: str | Path,
    *,
    model: CellPatch | str | Path | None = None,
    config: CellPatchConfig | Mapping[str, Any] | None = None,
    vocabulary: GeneVocabulary | None = None,
    settings: PretrainingSettings | Mapping[str, Any] | None = None,
    few_cells: bool | None = None,
    add_genes: bool | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    device: torch.device | str | None = None,
    devices: int | None = None,
    threads: int | None = None,
    checkpoint_minutes: float = 10.0,
    overwrite: bool = False,
    progress: bool | None = None,
) -> History:
    """Pretrain a CellPatch model by masked gene modelling.

    Parameters
    ----------
    data
        AnnData files, AnnData objects, 10x output or token stores: one, or a list.
    output
        Folder of the run: a model directory (`MaskedGeneModel.from_pretrained`; `CellPatch`'s takes
        the encoder alone), ``steps.csv``, ``epochs.csv``, ``training.json`` and the checkpoint. The
        same call goes on with a run that was interrupted, and ends with the same bits.
    model
        What to start from: a model or its directory. None for a new one.
    config, vocabulary
        Of a new model: all of its configuration, or a mapping of what shall be other than the
        defaults (those of ``few_cells``; values as token stores among the inputs have them), and
        its genes, by default the bundled human ones.
    settings
        How to train: all of it, or a mapping of what shall be other than the defaults.
    few_cells
        Take the settings for few cells (`PretrainingSettings.for_few_cells`), or the paper's. None
        decides by the number of cells, and says what it has decided: below 20,000 they are few.
    add_genes
        Give genes that the vocabulary lacks a token of their own, instead of leaving them out.
        None does so for a new model with the settings for few cells, if they fit.
    layer, use_raw, gene_column, input
        How the inputs are read, see `tl.embed`.
    device
        Where to compute; None for the GPU where there is one.
    devices
        Processes that are expected, of a run that ``torchrun`` has started; each takes a part of
        every batch. None for any.
    threads
        That read ahead, see `CellLoader`.
    checkpoint_minutes
        Time between checkpoints within an epoch; one is written after every epoch in any case.
    overwrite
        Begin anew where ``output`` holds a run already. A kill leaves that run, or the new one,
        which has no model to load until its first epoch is done, and goes on without this.
    progress
        Show a progress bar; None for only on a terminal.

    Returns
    -------
    History
        Epochs, steps, and the validation's results for the model that was kept.

    Raises
    ------
    InputError
        If an input, a setting or the folder cannot be used; or a loss is not finite.
    OSError
        If the folder cannot be written. What is done is kept.

    Examples
    --------
    >>> cellpatch_fast.training.pretrain("atlas.h5ad", "pretrained")  # doctest: +SKIP
    >>> model = cellpatch_fast.CellPatch.from_pretrained("pretrained")  # doctest: +SKIP
    """
    output = Path(output)
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    choice = choose(data, few_cells, settings, reading)
    first = complete(PretrainingSettings, settings, choice.few, None)
    with Processes.join(device, devices) as processes, seeded(first.seed, processes):
        require_possible(output, model, first, processes)
        if model is None:
            config = new_config(data, choice, config)
        started = starting_model(MaskedGeneModel, model, config, vocabulary)
        identity: dict[str, Any] = {
            "model": None if model is None else fingerprint(started, whole=True)
        }
        if add_genes or (add_genes is None and model is None and choice.few):
            learn_new_genes(started, data, reading, required=bool(add_genes))
        with opened(data, started.vocabulary, started.config, reading) as streams:
            report(streams, processes)
            cells = sum(stream.n_cells for stream in streams)
            chosen = complete(PretrainingSettings, settings, choice.few, cells)
            training, validation = split_blocks(cells, chosen)
            if processes.leads:
                logger.info(
                    "pretraining of a %s model, %s; %d epochs of batches of %d",
                    "new" if model is None else "given",
                    choice,
                    chosen.epochs,
                    chosen.batch_size,
                )
            common = loader_options(chosen, processes, threads) | {"masking": chosen.masking}
            task = MaskedGenes(
                started.to(processes.device).float(),
                CellLoader(streams, rows=training, shuffle=True, drop_last=True, **common),
                CellLoader(streams, rows=validation, **common) if len(validation) else None,
                chosen,
            )
            identity |= {
                "data": describe(streams),
                **reading.given(),
                "vocabulary": started.vocabulary.fingerprint,
                "config": started.config.to_dict(),
            }
            running = Running(output, overwrite, checkpoint_minutes, progress)
            require_resumable(KIND, chosen, identity, processes, running)
            if model is None:
                values = None
                if chosen.spectral:
                    size = started.config.max_genes
                    values = gather(streams, training, size, chosen.seed, threads).values
                begin(task.model, task.training, values, chosen, processes)
            return run_task(task, KIND, chosen, identity, processes, running)


class _Part(NamedTuple):
    cells: RaggedCells  # what the encoder sees
    targets: RaggedCells  # the genes to predict, and their values


class MaskedGenes(Task):
    """Masked gene modelling."""

    measures = ("pearson",)

    def __init__(
        self,
        model: MaskedGeneModel,
        training: CellLoader,
        validation: CellLoader | None,
        settings: PretrainingSettings,
    ) -> None:
        self.model: MaskedGeneModel = model
        self.training, self.validation = training, validation
        self._settings = settings

    def targets(self, batch: CellBatch) -> int:
        return _targets(batch).entries

    def parts(self, batch: CellBatch, number: int) -> Iterator[_Part]:
        targets = _targets(batch)
        if number == 1:
            yield _Part(batch.cells, targets)
            return
        for start, stop in ranges_of(len(targets), number):
            yield _Part(batch.cells.slice(start, stop), targets.slice(start, stop))

    def loss(self, part: _Part) -> Tensor:
        return (self._predict(part) - part.targets.values.float()).square().sum()

    def tally(self, batch: CellBatch) -> np.ndarray:
        """Number, squared error, and sums of predictions x, values y, x², y² and x·y."""
        part = _Part(batch.cells, _targets(batch))
        x, y = self._predict(part).double(), part.targets.values.double()
        sums = [(x - y).square(), x, y, x * x, y * y, x * y]
        return np.array([len(x), *torch.stack(sums).sum(1).tolist()])

    def summarise(self, sums: np.ndarray) -> dict[str, float]:
        number, error, x, y, xx, yy, xy = sums
        if not number:
            raise InputError(
                "the validation cells have no genes to predict: choose a larger validation share"
            )
        spread = np.sqrt((number * xx - x * x) * (number * yy - y * y))
        correlation = (number * xy - x * y) / spread if spread > 0 else 0.0
        return {"loss": float(error / number), "pearson": float(correlation)}

    def score(self, results: dict[str, float]) -> float:
        return -results["loss"]

    def _predict(self, part: _Part) -> Tensor:
        return self.model.predict(
            part.cells,
            part.targets,
            max_length=self._settings.max_decoder,
            backend=self._settings.backend,
        )


def _targets(batch: CellBatch) -> RaggedCells:
    assert batch.targets is not None  # the loader masks
    return batch.targets
