"""The token store: cells that are ready for a model, to be streamed as often as one likes.

Normalising, discretising and looking up genes are done once, by ``cellpatch tokenize``. What is
left of a cell is what a model sees: 3 bytes per expressed gene before compression, against 8 in
AnnData's CSR. It is a Zarr v3 group that zarr-python reads too::

    zarr.json    attribute "cellpatch_tokens": format_version, version, vocabulary, preprocessing,
                 counts, settings, shuffled (the seed, or null), inputs
    offsets      int64 [cells + 1]: cell c owns the entries offsets[c] : offsets[c + 1]
    genes        uint16 (uint32 where the vocabulary has more than 65,536 tokens) [entries]
    values       uint8 (discrete) or float16 (continuous) [entries]
    measured     uint8 [inputs, vocabulary size]: 1 where an input measured the token's gene
    obs          the cells' annotation, in anndata's encoding

``genes`` and ``values`` are cut into the same chunks and shards; their codecs are those of
`token_writer`. Within a cell entries are ordered by token, then by value. Since format version 2 a
CRC-32C follows every chunk: damage is refused, with the file and the cells named.

`TokenStore` opens such a store and checks that its parts fit together. It reads offsets, the
metadata, and nothing else: entries are read by chunks, by whoever streams them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ...errors import InputError
from ...files import write_whole
from ..chunks import chunks_of, read_whole
from ..interfaces import COPY_AGAIN, Chunks, is_address, reading
from ..sources import containers
from ..sources.identity import content_digest
from ..sources.tables import StoredTable, Table
from .partial import partial_of, unfinished_facts

if TYPE_CHECKING:
    import pandas as pd

    from ...cells import RaggedCells
    from ...config import Preprocessing

FORMAT_VERSION = 2
ATTRIBUTE = "cellpatch_tokens"
KIND = "token store"
EXPECTED = "Expected a token store, as cellpatch tokenize makes it"


def is_token_store(path: str | Path) -> bool:
    """Whether there is a token store at ``path``, of any format version, finished or not."""
    if is_address(path):
        with without_codec_warnings(), contextlib.closing(containers.open_zarr(path)) as container:
            return ATTRIBUTE in container.root.attrs
    path = Path(path).expanduser()
    try:
        return ATTRIBUTE in json.loads((path / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, LookupError, TypeError):
        return _unfinished(path) is not None


def gene_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The narrowest type that holds every token of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)


def value_dtype(preprocessing: Preprocessing) -> np.dtype[Any]:
    """uint8 for discrete values, float16 for continuous ones."""
    return np.dtype(np.uint8 if preprocessing.discrete else np.float16)


def narrowed(
    cells: RaggedCells, vocabulary_size: int, preprocessing: Preprocessing, first: int
) -> RaggedCells:
    """The cells with genes and values of a token store's types.

    ``first`` is the first cell's number, for messages.

    Raises
    ------
    InputError
        If a value is beyond what float16 holds.
    """
    import torch

    from ...cells import RaggedCells

    values, dtype = cells.values.numpy(), value_dtype(preprocessing)
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype, copy=False)
    if not np.isfinite(narrow).all():
        entry = int(np.flatnonzero(~np.isfinite(narrow))[0])
        cell = int(np.searchsorted(cells.offsets.numpy(), entry, side="right")) - 1
        raise InputError(
            f"cell {first + cell} (the first of all inputs is 0) has the value "
            f"{values[entry]:.6g}, but a token store holds continuous values as float16, up to "
            "65,504. Are these values logarithms? If so, clip them (value_clip of the "
            "configuration), or use discrete values."
        )
    genes = cells.genes.numpy().astype(gene_dtype(vocabulary_size), copy=False)
    return RaggedCells(cells.offsets, torch.from_numpy(genes), torch.from_numpy(narrow))


class TokenStore:
    """An open token store. A context manager.

    Discrete values are what the preprocessing made. Continuous ones are rounded to float16, so a
    cell embeds up to 5e-4 (relative norm; mostly 3e-5) off what it does from its AnnData file.

    Parameters
    ----------
    path
        The folder, a zip file of it, or its address (https://, s3://, gs://; needs the extra
        ``cloud``).

    Attributes
    ----------
    name
        The path or address as it was given, for messages.
    n_cells, entries
        Numbers of cells, and of entries of all cells together.
    offsets
        int64 [cells + 1]: cell ``c`` owns the entries ``offsets[c] : offsets[c + 1]``.
    genes, values
        uint16 or uint32, and uint8 or float16 [entries], to be read by chunks.
    vocabulary_fingerprint, vocabulary_size
        Which genes the tokens mean: `GeneVocabulary.fingerprint` and `GeneVocabulary.size`.
    preprocessing
        How counts became values.
    inputs
        The files that the cells come from. Where there are several, ``obs["cellpatch_input"]``
        says which a cell is from.
    counts
        ``entries``, ``unknown_entries`` and ``empty_cells``, see `atlas.Summary`.
    shuffled
        The seed of the cells' order; None for the order of the inputs.

    Raises
    ------
    InputError
        If there is no token store, it is unfinished, of another format version or damaged.

    Examples
    --------
    >>> with TokenStore("tokens.zarr") as store:  # doctest: +SKIP
    ...     print(store.n_cells, store.read_obs())
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        with without_codec_warnings():
            self._container = _opened(path)
            try:
                self._facts = _facts(self._container)
                self._take_facts()
                self._open_arrays()
            except BaseException:
                self._container.close()
                raise

    def read_obs(self) -> pd.DataFrame:
        """Annotation of the cells, one row each, in the store's order."""
        return containers.read_table(self._container, "obs")

    def obs_table(self) -> Table:
        """The same, read by columns and ranges: obs can take gigabytes."""
        return StoredTable(self._container, "obs", self.n_cells)

    def measured(self) -> np.ndarray:
        """Which tokens' genes each input measured: bool [inputs, vocabulary size].

        A token that an input did not measure says nothing by being absent from its cells.
        """
        shape = (len(self.inputs), self.vocabulary_size)
        array = self._array("measured")
        if array.shape != shape:
            raise InputError(
                f"{self.name}: measured has the shape {array.shape}, but there are "
                f"{len(self.inputs)} inputs and {self.vocabulary_size} tokens. {COPY_AGAIN}."
            )
        with reading(self.name, "measured"):
            return read_whole(array).astype(bool)

    def fingerprint(self) -> str:
        """A string that changes when the content does; reads obs, but no genes and values."""
        with reading(self.name, "obs"):
            obs = content_digest([(self._container.root["obs"], True)], self.name)
        facts = [self._facts, self.n_cells, self.entries, obs]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the store holds, for people."""
        settings = self._facts["settings"]
        return {
            "name": self.name,
            "cells": self.n_cells,
            "genes": str(self.genes.dtype),
            "values": str(self.values.dtype),
            "shuffled": "no" if self.shuffled is None else f"with seed {self.shuffled}",
            "obs_columns": containers.column_names(self._container, "obs"),
            **self.counts,
            **settings,
            "written by": f"cellpatch-fast {self._facts['version']}",
        }

    def close(self) -> None:
        self.genes.close()
        self.values.close()
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take_facts(self) -> None:
        """What the metadata says; anything else than expected is damage."""
        from ...config import Preprocessing

        try:
            vocabulary = self._facts["vocabulary"]
            self.vocabulary_fingerprint = str(vocabulary["fingerprint"])
            self.vocabulary_size = int(vocabulary["size"])
            self.preprocessing = Preprocessing(**self._facts["preprocessing"])
            self.inputs = [str(name) for name in self._facts["inputs"]]
            self.counts = {name: int(count) for name, count in self._facts["counts"].items()}
            shuffled = self._facts["shuffled"]
            self.shuffled = None if shuffled is None else int(shuffled)
            _ = self._facts["settings"].items(), self._facts["version"]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{self.name}: its attribute {ATTRIBUTE} is damaged "
                f"({type(error).__name__}: {error}). {COPY_AGAIN}."
            ) from error

    def _open_arrays(self) -> None:
        stored = self._array("offsets")
        self._require("offsets", stored.dtype, np.dtype(np.int64), stored.shape)
        with reading(self.name, "offsets"):
            self.offsets = read_whole(stored)  # [c + 1]
        self.n_cells = len(self.offsets) - 1
        self.genes = self._chunks("genes", gene_dtype(self.vocabulary_size))
        self.values = self._chunks("values", value_dtype(self.preprocessing))
        self._require_sound()
        self.entries = self.genes.length

    def _array(self, key: str) -> Any:
        element = self._container.element(key)
        array = self._container.array(element, key)
        absent = self._container.absent_chunks(element, thorough=False)
        containers.refuse_absent(absent, key, self.name)
        return array

    def _chunks(self, key: str, dtype: np.dtype[Any]) -> Chunks:
        array = self._array(key)
        self._require(key, array.dtype, dtype, array.shape)
        return chunks_of(array)

    def _require(
        self, key: str, found: np.dtype[Any], expected: np.dtype[Any], shape: tuple[int, ...]
    ) -> None:
        if found != expected or len(shape) != 1:
            raise InputError(
                f"{self.name}: {key} is {found} of shape {shape}; expected {expected} of one "
                f"dimension, for its vocabulary and preprocessing. {COPY_AGAIN}."
            )

    def _require_sound(self) -> None:
        """Offsets, genes, values and obs describe the same cells."""
        offsets, entries = self.offsets, (self.genes.length, self.values.length)
        rows = containers.table_length(self._container, "obs")
        decreasing = np.flatnonzero(offsets[1:] < offsets[:-1])
        if not len(offsets) or offsets[0] != 0:
            fault = f"offsets start at {offsets[0] if len(offsets) else 'nothing'}, not at 0"
        elif len(decreasing):
            fault = f"offsets decrease after cell {decreasing[0]}"
        elif not offsets[-1] == entries[0] == entries[1]:
            fault = (
                f"offsets end at {offsets[-1]}, but there are {entries[0]} genes and {entries[1]} "
                "values"
            )
        elif rows != self.n_cells:
            fault = f"offsets describe {self.n_cells} cells, obs {rows}"
        else:
            return
        raise InputError(f"{self.name}: {fault}. {COPY_AGAIN}, or repeat cellpatch tokenize.")


def _unfinished(path: Path) -> Path | None:
    """The folder of an unfinished token store that ``path`` is, or would become when finished."""
    partial = path if path.exists() else partial_of(path)
    journal = unfinished_facts(partial)
    return partial if journal is not None and journal["kind"] == KIND else None


def _opened(name: str | Path) -> containers.Container:
    """The store, if there is one and it is finished."""
    if is_address(name):
        return containers.open_zarr(name)
    path = Path(name).expanduser()
    if (partial := _unfinished(path)) is not None:
        raise InputError(
            f"{name}: {partial} is an unfinished token store. The cellpatch tokenize that began it "
            "finishes it: repeat that command, then open what it makes."
        )
    if not path.exists():
        raise InputError(f"{name}: no such file or folder. Check the path.")
    if path.is_dir() and not (path / "zarr.json").is_file():
        raise InputError(f"{name} is a folder, but no Zarr v3 store. {EXPECTED}.")
    return containers.open_zarr(path)


def _facts(container: containers.Container) -> dict[str, Any]:
    """The root's attribute, of a format version that we know."""
    with reading(container.name, "its attributes"):
        facts = dict(container.root.attrs).get(ATTRIBUTE)
    if not isinstance(facts, dict):
        raise InputError(f"{container.name} is no token store. {EXPECTED}.")
    format_version = facts.get("format_version")
    if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
        raise InputError(
            f"{container.name}: token store format version {format_version!r} is not supported "
            f"(this package reads up to {FORMAT_VERSION}; the store was written by cellpatch-fast "
            f"{facts.get('version')}): install a newer cellpatch-fast, or repeat cellpatch tokenize"
        )
    return facts


@contextlib.contextmanager
def without_codec_warnings() -> Iterator[None]:
    """zarr-python warns of codecs that other programs may lack; delta is chosen knowingly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3")
        yield


def consolidate(store: Path) -> None:
    """All metadata in the root's file as well: a remote store then opens with one request.

    The order is that of the names, not the one in which the file system lists them, so that the
    same store has the same bytes.
    """
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
        zarr.consolidate_metadata(store)
    file = store / "zarr.json"
    content = json.loads(file.read_text())
    metadata = content["consolidated_metadata"]["metadata"]
    content["consolidated_metadata"]["metadata"] = dict(sorted(metadata.items()))
    write_whole(file, json.dumps(content, indent=2))
