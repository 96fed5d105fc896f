"""What a run starts from: a new model or a copy of one, and the cells that it sees."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..config import CellPatchConfig
from ..errors import InputError
from ..model import CellPatch
from ..model.storage import local_directory, parts_of
from .data import new_genes, opened
from .distributed import Processes
from .settings import TrainingSettings

if TYPE_CHECKING:
    from ..genes import GeneVocabulary

CellPatchT = TypeVar("CellPatchT", bound=CellPatch)


def starting_model(
    kind: type[CellPatchT],
    model: CellPatch | str | Path | None,
    config: CellPatchConfig | None,
    vocabulary: GeneVocabulary | None,
    gene_scale: float,
) -> CellPatchT:
    """The model that training starts from, the run's own.

    Parameters
    ----------
    kind
        Its class; what ``model`` lacks of it is new.
    model
        A model or its directory; None for a new one of ``config`` and ``vocabulary``, by default
        the paper's and the human genes.
    gene_scale
        What the gene embedding of a new one is multiplied with.

    Raises
    ------
    InputError
        If the model cannot be loaded, or is given together with what it has already.
    """
    if model is None:
        from ..genes import GeneVocabulary

        made = kind(config or CellPatchConfig(), vocabulary or GeneVocabulary.human())
        with torch.no_grad():
            made.gene_embedding.weight.mul_(gene_scale)
        return made
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


def learn_new_genes(model: CellPatch, data: Any, options: dict[str, Any]) -> None:
    """Give genes of the inputs that the model's vocabulary lacks the next tokens."""
    with opened(data, model.vocabulary, model.config, options) as streams:
        model.vocabulary = model.vocabulary.add(new_genes(streams), model.config.max_genes)


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
