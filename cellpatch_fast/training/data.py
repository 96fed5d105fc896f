"""The cells of a training run: opened, described, labelled, and split.

A split is drawn by the seed alone. In data of more than 100,000 cells pretraining keeps *blocks* of
neighbouring cells apart, as they lie on disk, so that a split of 100 million cells is some thousand
ranges; labelled cells are split class by class, so that every class is in every part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import InputError
from ..loading.columns import read_names
from ..loading.inputs import CellStream, Stream, describe_input, open_stream
from ..loading.loader import listed_inputs
from .distributed import Processes
from .settings import FinetuningSettings, TrainingSettings

if TYPE_CHECKING:
    from ..config import CellPatchConfig, Reading
    from ..genes import GeneVocabulary

logger = logging.getLogger("cellpatch_fast")

BLOCK_CELLS = 64  # most neighbours that are split together
SINGLE_CELLS = 100_000  # up to so many cells each is split on its own

PARTS = "training", "validation", "test"
PART_NAMES = {part: part for part in PARTS}  # in a split column
PART_NAMES |= {"train": "training", "val": "validation", "valid": "validation"}


@contextlib.contextmanager
def opened(
    inputs: Any, vocabulary: GeneVocabulary, config: CellPatchConfig, reading: Reading
) -> Iterator[list[Stream]]:
    """The inputs of a run, opened for a model.

    Raises
    ------
    InputError
        If there is none, one cannot be used, or they have no entries at all.
    """
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(contextlib.closing(open_stream(x, vocabulary, config, reading)))
            for x in listed_inputs(inputs)
        ]
        if not any(int(stream.rows().offsets[-1]) for stream in streams):
            names = ", ".join(stream.name for stream in streams)
            raise InputError(f"{names}: all cells are empty, so there is nothing to learn from")
        yield streams


def report(streams: Sequence[Stream], processes: Processes) -> None:
    """Say what the inputs hold, and how their genes match."""
    if processes.leads:
        for stream in streams:
            logger.info("%s", stream)


def describe(streams: Sequence[Stream]) -> list[str]:
    """The inputs, in words that change when they do."""
    return [describe_input(stream.name, stream) for stream in streams]


def digest(*arrays: np.ndarray) -> str:
    """Changes when one of the arrays does; hexadecimal."""
    digested = hashlib.sha256()
    for array in arrays:
        digested.update(f"{array.dtype} {array.shape} ".encode())
        digested.update(np.ascontiguousarray(array).data)
    return digested.hexdigest()[:16]


def new_genes(streams: Sequence[Stream]) -> list[str]:
    """Names of genes that the vocabulary lacks, each once."""
    names = [stream.match.unknown for stream in streams if isinstance(stream, CellStream)]
    return list(dict.fromkeys(name for unknown in names for name in unknown))


def split_blocks(cells: int, settings: TrainingSettings) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation cells as ranges, int64 [ranges, 2] each, ascending.

    Raises
    ------
    InputError
        If there are fewer training cells than a batch has.
    """
    size = 1 if cells <= SINGLE_CELLS else BLOCK_CELLS
    starts = np.arange(0, cells, size)
    kept = np.zeros(len(starts), bool)
    if settings.validation:
        rng = np.random.default_rng([settings.seed, len(starts)])
        number = max(1, round(settings.validation * len(starts)))
        kept[rng.choice(len(starts), min(number, len(starts)), replace=False)] = True
    ranges = np.stack([starts, np.minimum(starts + size, cells)], axis=1)
    training, validation = ranges[~kept], ranges[kept]
    require_batch(int((training[:, 1] - training[:, 0]).sum()), settings.batch_size)
    return training, validation


def require_batch(cells: int, batch_size: int) -> None:
    """Refuse training on fewer cells than a batch has."""
    if cells < batch_size:
        raise InputError(
            f"only {cells:,} cells are left to train on, too few for batches of {batch_size:,}. "
            "Use more cells, keep fewer apart (--validation, --test), take the settings for few "
            f"cells (--few-cells), or smaller batches (--batch-size {max(1, cells // 8)})"
        )


@dataclass(frozen=True, eq=False)
class Labels:
    """What the cells are.

    Parameters
    ----------
    classes
        Names of the classes that are kept, in their order.
    codes
        int64 [cells]: place in ``classes``; -1 for a cell that is left out.
    missing
        Cells without a label.
    too_few
        Classes that are left out because they have too few cells, with their numbers of cells.
    """

    classes: tuple[str, ...]
    codes: np.ndarray
    missing: int
    too_few: dict[str, int]

    def __str__(self) -> str:
        text = f"{int((self.codes >= 0).sum()):,} cells of {len(self.classes)} classes"
        if self.missing:
            text += f"; {self.missing:,} cells without a label are left out"
        if self.too_few:
            listed = ", ".join(f"{name} ({count})" for name, count in self.too_few.items())
            text += f"; classes with too few cells are left out: {listed}"
        return text


def _names(streams: Sequence[Stream], column: str) -> np.ndarray:
    """The names in a column of obs, object [cells]; None where there is none."""
    tables = [stream.obs_table() for stream in streams]
    return read_names(tables, [stream.name for stream in streams], column)


def read_labels(streams: Sequence[Stream], column: str, min_cells: int) -> Labels:
    """The classes of the cells.

    Raises
    ------
    InputError
        If there is no such column, or fewer than two classes have enough cells.
    """
    names = _names(streams, column)
    counts = pd.Series(names).value_counts().sort_index()
    enough = counts[counts >= min_cells]
    if len(enough) < 2:
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise InputError(
            f"obs[{column!r}] has {len(enough)} classes with at least {min_cells} cells, but "
            f"training needs two. It has: {listed or 'no labels'}"
        )
    classes = tuple(map(str, enough.index))
    return Labels(
        classes=classes,
        codes=pd.Categorical(names, classes).codes.astype(np.int64),
        missing=int(pd.isna(names).sum()),
        too_few={str(name): int(count) for name, count in counts[counts < min_cells].items()},
    )


def split_labelled(labels: Labels, settings: FinetuningSettings) -> dict[str, np.ndarray]:
    """The rows of each of `PARTS`, int64 ascending, class by class.

    Of each class at least one cell is for training; validation and test cells are rounded down
    from their shares, but at least one where a class has three cells and the share is not 0.
    """
    rng = np.random.default_rng([settings.seed, len(labels.codes)])
    rows: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for code in range(len(labels.classes)):
        members = rng.permutation(np.flatnonzero(labels.codes == code))
        sizes = [
            max(int(share * len(members)), 1) if share and len(members) >= 3 else 0
            for share in (settings.test, settings.validation)
        ]
        sizes[np.argmax(sizes)] -= max(0, sum(sizes) + 1 - len(members))  # one is left in any case
        ends = np.cumsum(sizes)
        for part, chosen in zip(reversed(PARTS), np.split(members, ends), strict=True):
            rows[part].append(chosen)
    return {part: np.sort(np.concatenate(chosen)) for part, chosen in rows.items()}


def split_by_column(
    streams: Sequence[Stream], column: str, labels: Labels, settings: FinetuningSettings
) -> dict[str, np.ndarray]:
    """The rows of each of `PARTS`, as a column of obs says: training, validation, test.

    Where it names no validation cells, the share in ``settings`` of the training cells is kept
    apart, class by class.

    Raises
    ------
    InputError
        If the column has other values, or a class no training cells.
    """
    names = _names(streams, column)
    parts = pd.Series(names).str.lower().map(PART_NAMES).to_numpy(object)
    strangers = sorted({str(name) for name in names[pd.isna(parts)]})
    if strangers:
        raise InputError(
            f"obs[{column!r}] says how cells are split and may hold training (train), validation "
            f"(val) and test, found also: {', '.join(strangers[:10])}"
        )
    labelled = labels.codes >= 0
    rows = {part: np.flatnonzero(labelled & (parts == part)) for part in PARTS}
    seen = np.bincount(labels.codes[rows["training"]], minlength=len(labels.classes))
    unseen = [name for name, count in zip(labels.classes, seen, strict=True) if not count]
    if unseen:
        raise InputError(
            f"obs[{column!r}] leaves no training cells of: {', '.join(unseen)}. Give each class "
            "some, or leave its cells out"
        )
    if not len(rows["validation"]):
        codes = np.full(len(labels.codes), -1)
        codes[rows["training"]] = labels.codes[rows["training"]]
        within = dataclasses.replace(settings, test=0.0)
        parts = split_labelled(dataclasses.replace(labels, codes=codes), within)
        rows |= {part: parts[part] for part in ("training", "validation")}
    return rows
