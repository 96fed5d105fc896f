"""The CellPatch encoder: the module, its directory on disk, and the original's models."""

from .encoder import CellPatch, Pool, pool
from .live import accelerate, restore
from .storage import fingerprint

__all__ = ["CellPatch", "Pool", "accelerate", "fingerprint", "pool", "restore"]
