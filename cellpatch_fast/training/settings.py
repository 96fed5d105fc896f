"""How a model is trained: the paper's numbers as defaults, checked before any work is done.

Settings hold what the result depends on. What it does not depend on (devices, threads, how often a
checkpoint is written) is an argument of the functions that train. The options of the command line
are made from these classes: the first sentence about a setting is its help (`cli.fields`), so this
module imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from ..config import Backend, Masking
from ..errors import InputError

Optimizer = Literal["adam", "adamw"]
# What pretraining and fine-tuning have in common on some hundred or thousand cells. The paper's
# settings are for millions; what these are worth is in bench/RESULTS.md, "Quality".
FEW_CELLS: dict[str, Any] = {
    "optimizer": "adamw", "schedule": "cosine", "spectral": True, "whitened": True,
    "keep_best": False, "patience": 0,
}  # fmt: skip
FEW_STEPS = 700  # of training on few cells; more learn the cells by heart
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20

Schedule = Literal["constant", "cosine"]
Precision = Literal["float32", "bfloat16"]

KINDS: dict[Any, tuple[Any, str]] = {  # of settings, as they are annotated
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
}


@dataclass(frozen=True)
class TrainingSettings:
    """What pretraining and fine-tuning have in common.

    Parameters
    ----------
    epochs
        Times that every training cell is seen.
    batch_size
        Cells per step of the optimiser, whatever the number of devices.
    accumulate
        Parts that a batch is computed in, one after the other: each takes that much less memory.
        Gradients are summed, so it changes the result by rounding only (and by which weights
        dropout drops).
    optimizer
        How weights move: by Adam, as in the paper, or by AdamW. Adam's weight decay is part of the
        gradient, which it scales, so that weights with small gradients (those of rare genes) decay
        fast. AdamW decays all weights alike. Rows of genes that were not measured are no part of a
        step: AdamW's decay is made up for at the end, under Adam they stay as they are.
    learning_rate
        Of the optimiser.
    weight_decay
        Of the optimiser.
    gradient_clip
        Largest norm of the gradient; 0 for no limit.
    schedule
        Course of the learning rate: constant, or as a cosine down to 0 at the last step.
    warmup_steps
        Steps in which the learning rate rises to its value.
    precision
        Of the products in training, on a GPU. ``"bfloat16"`` runs them under `torch.autocast`;
        weights stay float32, and so does validation.
    compile
        Have `torch.compile` make one program of a step.
    validation
        Share of cells kept apart to tell how well the model does on cells that it has not seen; 0
        for none.
    patience
        Stop after so many epochs without improvement on the validation cells; 0 never stops.
    keep_best
        Keep the model of the epoch that did best on the validation cells; else that of the last
        one, which a schedule that ends in 0 leads to. (The best of 20 epochs on 60 cells is chosen
        by chance.)
    gene_rate
        Learning rate of the gene embedding, as a multiple of ``learning_rate``. A gene's row learns
        from the cells that express it.
    encoder_rate
        Learning rate of the rest of the encoder, as a multiple of ``learning_rate``. Every cell
        moves it, and with it the features of all cells at once.
    spectral
        Of a new model: start gene rows from principal components of the training cells, and scores
        of attention from the values. See `spectral`.
    whitened
        Of a new model: choose the output projection of its cross-attention such that what it finds
        in the first cells has mean 0, variance 1 and no correlations. Drawn at random, as in the
        original, a patch finds the mean of a cell's genes, which is nearly the same for all cells.
    seed
        Of weights, order, masks and dropout.
    deterministic
        Equal bits on every run on the same hardware, also on a GPU (slower there).
    backend
        What computes; None for the fastest.
    """

    epochs: int = 50
    batch_size: int = 512
    accumulate: int = 1
    optimizer: Optimizer = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 5e-5
    gradient_clip: float = 5.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    precision: Precision = "float32"
    compile: bool = False
    validation: float = 0.05
    patience: int = 0
    keep_best: bool = True
    gene_rate: float = 1.0
    encoder_rate: float = 1.0
    spectral: bool = False
    whitened: bool = False
    seed: int = 0
    deterministic: bool = False
    backend: Backend | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type in KINDS:
                kind, expected = KINDS[field.type]
                value = getattr(self, field.name)
                fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
                self._require(field.name, fits, expected)
        for name in ("epochs", "batch_size", "accumulate"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("weight_decay", "warmup_steps", "gradient_clip", "patience", "seed"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "gene_rate", "encoder_rate"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive")
        self._require("validation", 0 <= self.validation < 1, "at least 0 and below 1")
        self._require("optimizer", self.optimizer in get_args(Optimizer), "adam or adamw")
        self._require("schedule", self.schedule in get_args(Schedule), "constant or cosine")
        self._require("precision", self.precision in get_args(Precision), "float32 or bfloat16")
        if self.patience and not self.validation:
            raise InputError(
                "patience needs validation cells: choose a validation share above 0, or patience 0"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {expected}, found {getattr(self, name)!r}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, of 0 to ``steps`` - 1."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; fields that are missing have their defaults.

        Raises
        ------
        InputError
            If there are unknown fields, or values that make no sense.
        """
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"unknown training settings: {', '.join(sorted(unknown))}")
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise InputError(f"training settings: {error}") from error


@dataclass(frozen=True)
class PretrainingSettings(TrainingSettings):
    """Settings of masked gene modelling.

    Parameters
    ----------
    hidden
        Share of a cell's genes that the encoder does not see.
    zeros
        Zeros that the decoder predicts for each hidden gene.
    max_encoder
        Most genes of a cell that the encoder sees.
    max_decoder
        Most genes of a cell that the decoder predicts, zeros included.

    See `cellpatch_fast.Masking`.
    """

    hidden: float = Masking.hidden
    zeros: float = Masking.zeros
    max_encoder: int = Masking.max_encoder
    max_decoder: int = Masking.max_decoder

    @classmethod
    def for_few_cells(cls, cells: int | None = None, **changes: Any) -> PretrainingSettings:
        """For some hundred or thousand cells; see also `CellPatchConfig.for_few_cells`.

        Parameters
        ----------
        cells
            Cells to train on, of which a batch takes an eighth at most.
        changes
            Settings that shall be others.
        """
        fields = {"epochs": 20, "batch_size": batch_of(cells, 16), "learning_rate": 2e-3}
        fields |= {"warmup_steps": 50, "weight_decay": 1e-2, "encoder_rate": 0.3, "gene_rate": 10.0}
        return cls(**FEW_CELLS | fields | changes)

    @property
    def masking(self) -> Masking:
        return Masking(self.hidden, self.zeros, self.max_encoder, self.max_decoder)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = self.masking
        except ValueError as error:
            raise InputError(str(error)) from error


@dataclass(frozen=True)
class FinetuningSettings(TrainingSettings):
    """Settings of cell type annotation.

    Parameters
    ----------
    epochs
        Times that every training cell is seen; for few cells as many as 700 steps are, but 3
        to 20.
    test
        Share of cells that take no part in training at all and tell how good its result is.
    hidden
        Share of a cell's genes to hide from the encoder in training, others in every epoch, so
        that no cell is learnt by heart; 0 for none.
    guided
        Of a spectral start: take up to half of its dimensions from a linear model of the training
        cells' labels. (On 700 blood cells it makes the network's accuracy 0.84 instead of 0.81.)
    linear
        Give the annotator a linear path beside its patches, mixed by validation cells. See
        `cellpatch_fast.model.linear`.
    freeze_encoder
        Train the head alone.
    balance
        Show cells of all classes equally often.
    min_cells
        Classes with fewer cells are left out.
    """

    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    validation: float = 0.1
    patience: int = 10
    test: float = 0.1
    hidden: float = 0.0
    guided: bool = False
    linear: bool = False
    freeze_encoder: bool = False
    balance: bool = False
    min_cells: int = 5

    @classmethod
    def for_few_cells(cls, cells: int | None = None, **changes: Any) -> FinetuningSettings:
        """For some hundred or thousand cells; see also `CellPatchConfig.for_few_cells`.

        Parameters
        ----------
        cells
            Cells to train on, which decide on the number of epochs (`FEW_STEPS` steps, but 3 to 20
            epochs; None for 20), and of which a batch takes an eighth at most.
        changes
            Settings that shall be others.
        """
        fields: dict[str, Any]
        fields = {"batch_size": batch_of(cells, 32), "learning_rate": 1e-3, "warmup_steps": 20}
        fields |= {"weight_decay": 0.3, "encoder_rate": 0.1, "hidden": 0.5}
        fields |= {"guided": True, "linear": True}
        fields = FEW_CELLS | fields | changes
        steps = max(1, (cells or 0) / fields["batch_size"])  # of an epoch
        epochs = min(max(round(FEW_STEPS / steps), FEWEST_EPOCHS), MOST_EPOCHS)
        return cls(**{"epochs": epochs} | fields)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("test", "hidden"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("min_cells", self.min_cells >= 1, "at least 1")
        if self.validation + self.test >= 1:
            raise InputError(
                f"validation ({self.validation}) and test ({self.test}) leave no cells to train on"
            )


def batch_of(cells: int | None, most: int) -> int:
    """A batch of ``most`` cells, or of an eighth of those that there are."""
    return most if cells is None else min(most, max(1, cells // 8))
