"""Genes: their names, what they are called elsewhere, and which token stands for which."""

from .vocabulary import GeneVocabulary

__all__ = ["GeneVocabulary"]


def __dir__() -> list[str]:
    return __all__
