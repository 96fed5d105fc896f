"""The CellPatch models: the modules, their directory on disk, and the original's models."""

from .annotator import CellPatchAnnotator
from .decoder import MaskedGeneModel
from .encoder import CellPatch, Pool, pool
from .live import accelerate, restore
from .storage import fingerprint

__all__ = [
    "CellPatch",
    "CellPatchAnnotator",
    "MaskedGeneModel",
    "Pool",
    "accelerate",
    "fingerprint",
    "pool",
    "restore",
]


def __dir__() -> list[str]:
    return __all__
