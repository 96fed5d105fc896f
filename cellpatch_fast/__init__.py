"""cellpatch-fast: fast, exact embeddings of single cells with the CellPatch model.

The public names, nothing else. Each is imported when it is first used, so that
``import cellpatch_fast`` costs milliseconds and those who need only a part (the kernels, say)
never load the rest.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import atlas, datasets, io, kernels, pl, pp, tl
    from .cells import RaggedCells
    from .config import CellPatchConfig, Masking
    from .errors import InputError
    from .genes import GeneVocabulary
    from .loading import CellLoader
    from .model import CellPatch, CellPatchAnnotator, MaskedGeneModel, accelerate

__all__ = [
    "CellLoader",
    "CellPatch",
    "CellPatchAnnotator",
    "CellPatchConfig",
    "GeneVocabulary",
    "InputError",
    "MaskedGeneModel",
    "Masking",
    "RaggedCells",
    "accelerate",
    "atlas",
    "datasets",
    "io",
    "kernels",
    "pl",
    "pp",
    "tl",
]

__version__ = version("cellpatch-fast")

# The module that defines each name; a name that is missing here is a module itself.
_DEFINED_IN = {
    "CellLoader": "loading",
    "CellPatch": "model",
    "CellPatchAnnotator": "model",
    "CellPatchConfig": "config",
    "GeneVocabulary": "genes",
    "InputError": "errors",
    "MaskedGeneModel": "model",
    "Masking": "config",
    "RaggedCells": "cells",
    "accelerate": "model",
}


def __getattr__(name: str) -> object:
    """Import a public name at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_DEFINED_IN.get(name, name)}", __name__)
    value = getattr(module, name) if name in _DEFINED_IN else module
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
