"""What a run starts from: a new model or a copy of one, and the cells that it sees."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from scipy.sparse import csr_array

from .. import kernels
from ..config import CellPatchConfig, Reading
from ..errors import InputError
from ..loading import CellLoader
from ..model import CellPatch
from ..model.storage import local_directory, parts_of
from .data import new_genes, opened
from .distributed import Processes
from .settings import TrainingSettings
from .spectral import start_from_data

if TYPE_CHECKING:
    from ..genes import GeneVocabulary

logger = logging.getLogger("cellpatch_fast")

WHITENED_CELLS = 512  # enough for the covariance of 32 numbers, which 64 patches of each have
LEAST_VARIANCE = 1e-4  # of the largest: what varies less is noise, and stays small

CellPatchT = TypeVar("CellPatchT", bound=CellPatch)


def starting_model(
    kind: type[CellPatchT],
    model: CellPatch | str | Path | None,
    config: CellPatchConfig | Mapping[str, Any] | None,
    vocabulary: GeneVocabulary | None,
) -> CellPatchT:
    """The model that training starts from, the run's own.

    Parameters
    ----------
    kind
        Its class; what ``model`` lacks of it is new.
    model
        A model or its directory; None for a new one of ``config`` (complete then) and
        ``vocabulary``, by default the human genes.

    Raises
    ------
    InputError
        If the model cannot be loaded, or is given together with what it has already.
    """
    if model is None:
        from ..genes import GeneVocabulary

        assert isinstance(config, CellPatchConfig)
        return kind(config, vocabulary or GeneVocabulary.human())
    if config is not None or vocabulary is not None:
        raise InputError(
            "a model has its own configuration and vocabulary: give a model to start from, or "
            "config and vocabulary for a new one"
        )
    if isinstance(model, str | Path):
        directory = local_directory(model)
        whole = parts_of(directory).issuperset(kind._own_parts)
        model = (kind if whole else CellPatch).from_pretrained(directory)
    else:
        model = copy.deepcopy(model)
    return model if isinstance(model, kind) else kind.from_encoder(model)


def begin(
    model: CellPatch,
    loader: CellLoader,
    values: csr_array | None,
    settings: TrainingSettings,
    processes: Processes,
    guide: np.ndarray | None = None,
) -> None:
    """Start a new model from the cells that it is to learn from, as its settings say.

    Parameters
    ----------
    model
        A new model.
    loader
        Of the cells to train on.
    values, guide
        See `spectral.start_from_data`; ``values`` is None where the start is not spectral.
    """
    if settings.spectral:
        assert values is not None
        start_from_data(model, values, settings.seed, guide)
    if settings.whitened:
        whiten_attention(model, loader, settings, processes)


@torch.inference_mode()
def whiten_attention(
    model: CellPatch, loader: CellLoader, settings: TrainingSettings, processes: Processes
) -> None:
    """Have what the cross-attention of a new model adds to the patches tell cells apart.

    Attended values [c, p, D] of the first cells get mean 0 and the identity as covariance, by the
    output projection: its drawn matrix follows the (symmetric) whitening matrix.

    Parameters
    ----------
    model
        Its output projection is replaced.
    loader
        Of the cells to begin with: `WHITENED_CELLS`, of all processes together.
    settings, processes
        Of the run.
    """
    weights, projection = model.encoder_weights(), model.cross_block.attention.out_proj
    dim = model.config.dim
    sums = np.zeros(1 + dim + dim * dim)  # number, sum, and sum of products
    with contextlib.closing(iter(loader)) as batches:
        for batch in itertools.islice(batches, -(-WHITENED_CELLS // settings.batch_size)):
            cells = batch.cells
            attended, _ = kernels.patch_attention(
                weights,
                offsets=cells.offsets,
                genes=cells.genes,
                values=cells.values,
                pads=model.pads_of(cells),
                backend=settings.backend,
            )
            attended = attended[cells.lengths > 0].flatten(0, 1).double()  # [c · p, D]
            parts = [
                attended.new_tensor([len(attended)]),
                attended.sum(0),
                (attended.T @ attended).flatten(),
            ]
            sums += torch.cat(parts).numpy(force=True)
    number, total, products = np.split(processes.sum(sums), [1, 1 + dim])
    if not number:
        return
    mean = total / number
    covariance = products.reshape(dim, dim) / number - np.outer(mean, mean)
    variances, directions = np.linalg.eigh(covariance)
    if variances[-1] <= 0:
        return
    variances = variances.clip(min=LEAST_VARIANCE * variances[-1])
    drawn = projection.weight.numpy(force=True).astype(np.float64)
    matrix = drawn @ (directions / np.sqrt(variances)) @ directions.T
    matrix *= np.sqrt(dim / np.square(drawn).sum())
    projection.weight.copy_(torch.from_numpy(matrix))
    projection.bias.copy_(torch.from_numpy(-matrix @ mean))


def learn_new_genes(model: CellPatch, data: Any, reading: Reading, *, required: bool) -> None:
    """Give genes of the inputs that the model's vocabulary lacks the next tokens.

    Where they do not fit it is an error if they are ``required``, else they stay without.
    """
    with opened(data, model.vocabulary, model.config, reading) as streams:
        try:
            model.vocabulary = model.vocabulary.add(new_genes(streams), model.config.max_genes)
        except InputError as error:
            if required:
                raise
            logger.warning("genes that the vocabulary lacks are left out: %s", error)


def loader_options(
    settings: TrainingSettings, processes: Processes, threads: int | None
) -> dict[str, Any]:
    """What the loaders of training and validation cells have in common."""
    return {
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "rank": processes.rank,
        "world_size": processes.world_size,
        "share_batches": True,
        "device": processes.device,
        "threads": threads,
    }
