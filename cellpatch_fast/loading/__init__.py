"""`CellLoader`: cells from disk to ragged batches, in file order or sampled, in pinned memory.

Which cells come in which batch is said by a `Sampler`: `Sampling`, or one of your own.
"""

from .loader import CellLoader
from .sampler import Epoch, Sampler, Window
from .sampling import Sampling
from .windows import CellBatch

__all__ = ["CellBatch", "CellLoader", "Epoch", "Sampler", "Sampling", "Window"]


def __dir__() -> list[str]:
    return __all__
