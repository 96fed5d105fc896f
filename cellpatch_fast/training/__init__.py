"""Training: pretraining by masked gene modelling, and fine-tuning for cell type annotation."""

from .loop import History
from .pretraining import pretrain
from .settings import FinetuningSettings, PretrainingSettings

__all__ = ["FinetuningSettings", "History", "PretrainingSettings", "pretrain"]
