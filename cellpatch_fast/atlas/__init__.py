"""Any number of cells: files in, one store out; shards, resumption, row order kept.

`embed`, `annotate` and `tokenize` are functions here, each defined in the module of its name.
"""

from .annotate import Annotated, annotate
from .embed import embed
from .summary import Summary
from .tokenize import tokenize

__all__ = ["Annotated", "Summary", "annotate", "embed", "tokenize"]


def __dir__() -> list[str]:
    return __all__
