"""Training: pretraining by masked gene modelling, and fine-tuning for cell type annotation.

Names are imported when they are first used: the command line takes the settings from here, and
answers ``--help`` without loading PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..inference.evaluation import Evaluation, evaluate
    from .finetuning import Finetuned, finetune
    from .pretraining import pretrain
    from .settings import FinetuningSettings, PretrainingSettings
    from .task import History

__all__ = [
    "Evaluation",
    "Finetuned",
    "FinetuningSettings",
    "History",
    "PretrainingSettings",
    "evaluate",
    "finetune",
    "pretrain",
]

_DEFINED_IN = {
    "Evaluation": "..inference.evaluation",
    "Finetuned": ".finetuning",
    "FinetuningSettings": ".settings",
    "History": ".task",
    "PretrainingSettings": ".settings",
    "evaluate": "..inference.evaluation",
    "finetune": ".finetuning",
    "pretrain": ".pretraining",
}


def __getattr__(name: str) -> object:
    """Import a public name at its first use (PEP 562)."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_DEFINED_IN[name], __name__), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return __all__
