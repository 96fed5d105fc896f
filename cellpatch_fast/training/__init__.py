"""Training: pretraining by masked gene modelling, and fine-tuning for cell type annotation."""

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
