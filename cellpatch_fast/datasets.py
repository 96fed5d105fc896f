"""Data sets to try things on."""

from __future__ import annotations

from .synthetic.generate import synthetic_atlas
from .synthetic.tissue import synthetic_tissue

__all__ = ["synthetic_atlas", "synthetic_tissue"]


def __dir__() -> list[str]:
    return __all__
