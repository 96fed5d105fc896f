"""Data sets to try things on."""

from __future__ import annotations

from .synthetic.generate import synthetic_atlas

__all__ = ["synthetic_atlas"]


def __dir__() -> list[str]:
    return __all__
