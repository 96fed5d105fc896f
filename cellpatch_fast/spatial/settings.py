"""How a network on a tissue is trained: three presets, checked before any work is done.

``default`` is what did best here (see bench/RESULTS.md): STAGATE's published settings, fewer
epochs, and CellPatch's features frozen, centred and reduced to 30 components. ``paper`` is what the
CellPatch paper says, ``original-code`` what its code does; both train the encoder too.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from ..errors import InputError
from .choices import Preset, Tie

Features = Literal["frozen", "trained"]
Attended = Literal["non-zero", "variable"]


@dataclass(frozen=True)
class SpatialSettings:
    """What the result depends on.

    Parameters
    ----------
    variable_genes
        Most genes whose expression is used: the most variable ones (``seurat_v3``, on counts); all
        where there are no more.
    target_sum
        Library size after normalisation; values are log1p of it.
    features
        CellPatch's features: ``"frozen"``, or ``"trained"`` with the network. They are those of the
        first block, without self-attention and projection.
    attended
        What patches attend to where features are trained: a spot's ``"non-zero"`` genes, or all
        ``"variable"`` genes, zeros included.
    components
        Principal components that frozen features are reduced to; 0 takes all as they are.
    expression
        Whether expression is the network's input too.
    dense
        Predict genes by a linear layer after the decoder, instead of the decoder itself.
    tie
        Of the decoder's matrices; see `stagate.StagateConfig`.
    hidden, output
        Widths of the network's layers.
    epochs, learning_rate, weight_decay, gradient_clip
        Of Adam, one step per epoch.
    seed
        Of weights and dropout.
    """

    variable_genes: int = 3000
    target_sum: float = 1e4
    features: Features = "frozen"
    attended: Attended = "non-zero"
    components: int = 30
    expression: bool = True
    dense: bool = False
    tie: Tie = "true"
    hidden: int = 512
    output: int = 30
    epochs: int = 500
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    gradient_clip: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("variable_genes", "components", "hidden", "output", "epochs", "seed"):
            self._require(name, isinstance(getattr(self, name), Integral), "a whole number")
        for name in ("variable_genes", "hidden", "output", "epochs"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("components", "seed"):
            self._require(name, getattr(self, name) >= 0, "not negative")
        for name in ("weight_decay", "gradient_clip"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "not negative and finite")
        for name in ("learning_rate", "target_sum"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name, kind in (("features", Features), ("attended", Attended), ("tie", Tie)):
            choices = get_args(kind)
            self._require(name, getattr(self, name) in choices, " or ".join(choices))
        if not self.expression and not self.dense:
            raise InputError("features alone as input need a dense layer to the genes: dense=True")
        if self.features == "trained" and self.components:
            raise InputError("trained features are not reduced: components must be 0")

    def _require(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise InputError(f"{name} must be {expected}, found {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> SpatialSettings:
        """The settings called ``name``, but for ``changes``.

        Raises
        ------
        InputError
            If there is none of that name, or a setting is unknown or wrong.
        """
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}: choose {', '.join(PRESETS)}")
        unknown = changes.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(**PRESETS[name] | changes)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "features": "trained", "components": 0, "dense": True, "epochs": 1000,
        "learning_rate": 1e-4, "gradient_clip": 0.1,
    },
    "original-code": {
        "features": "trained", "components": 0, "dense": True, "epochs": 1000,
        "expression": False, "attended": "variable",
    },
}  # fmt: skip
