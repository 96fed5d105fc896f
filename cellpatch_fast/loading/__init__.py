"""`CellLoader`: cells from disk to ragged batches, in file order or sampled, in pinned memory."""

from .loader import CellLoader
from .windows import CellBatch

__all__ = ["CellBatch", "CellLoader"]


def __dir__() -> list[str]:
    return __all__
