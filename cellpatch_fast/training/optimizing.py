"""The optimiser of a run: which weights it trains, how fast, and what decay does to others."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model import CellPatch
from .settings import TrainingSettings


def make_optimizer(model: CellPatch, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Of the weights to train; a group's learning rate is ``times`` that of the settings."""
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return _without_compiler(kind)(
        _groups(model, settings),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _without_compiler(kind: type[torch.optim.Adam]) -> type[torch.optim.Adam]:
    """The same optimiser, whose methods do not import PyTorch's compiler.

    They do so only to keep the compiler away from them, which took 1.1 s of each process.
    """
    wrapped = ("add_param_group", "state_dict", "load_state_dict", "zero_grad", "step")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in wrapped}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(methods["step"])})


def _groups(model: CellPatch, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Weights to train, and ``times``, their learning rate's multiple."""
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


def untrained_rows_left(
    model: CellPatch, settings: TrainingSettings, rates: Iterable[float]
) -> float:
    """What decay has left, after steps at these learning rates, of a gene row that no cell has."""
    if settings.optimizer != "adamw" or not model.gene_embedding.weight.requires_grad:
        return 1.0
    decays = np.array(list(rates)) * settings.gene_rate * settings.weight_decay
    return float(np.prod(1 - decays))


def first_not_finite(model: nn.Module) -> str:
    """The name of a parameter that is not finite, or else of a gradient; else ``"sum"``."""
    named: list[tuple[str, Tensor | None]] = []
    named += [(f"parameter {name}", p) for name, p in model.named_parameters()]
    named += [(f"gradient of {name}", p.grad) for name, p in model.named_parameters()]
    culprits = (name for name, x in named if x is not None and not x.isfinite().all())
    return next(culprits, "sum")
