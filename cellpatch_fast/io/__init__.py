"""What is on disk: AnnData sources, the token store, the embedding store."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .stores.tokens import TokenStore

__all__ = ["TokenStore"]


def __getattr__(name: str) -> object:
    """Import the public name at its first use (PEP 562): it needs NumPy, and later Zarr."""
    if name != "TokenStore":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .stores.tokens import TokenStore

    return TokenStore


def __dir__() -> list[str]:
    return __all__
