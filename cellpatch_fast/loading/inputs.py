"""What the loader reads from: AnnData sources prepared for a model, and token stores.

Both know how many cells there are, how their genes match the vocabulary and how to read rows of
them (`rows.Rows`); the loader needs nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..cells import CellBlock
from ..config import Preprocessing, Reading
from ..errors import InputError
from ..io.sources.matrices import CsrMatrix, DenseMatrix
from ..io.sources.source import CellSource, open_source
from ..io.stores.obs import SOURCE_COLUMN
from ..io.stores.tokens import TokenStore, is_token_store
from ..preprocessing.changes import Expectation
from ..preprocessing.detection import Detected, detect_input, warn_of_selection
from ..preprocessing.selection import selection_of_genes
from ..preprocessing.tokens import token_types, tokenize
from .columns import read_column
from .rows import MatrixRows, Rows, TokenRows

if TYPE_CHECKING:
    from anndata import AnnData

    from ..config import CellPatchConfig, Expected
    from ..genes import GeneVocabulary
    from ..genes.vocabulary import GeneMatch
    from ..io.sources.tables import Table

# What the kind of a matrix is told from: cells, in runs all over it; and at most
SAMPLE_CELLS, SAMPLE_RUNS = 2_000, 8
SAMPLE_ENTRIES = 8_000_000
SAMPLE_VALUES = 4_000_000  # of a run in a dense matrix, zeros included
SAMPLE_BYTES = 1 << 28  # of chunks, unless a single one has more
TOTALS_CELLS = 5_000_000  # whose total counts are read, a whole column, to be compared


class CellStream:
    """The cells of an AnnData source, prepared for a model.

    Parameters
    ----------
    source
        Where the cells come from; closed with this.
    vocabulary, config
        The model's.
    reading
        The column of gene names, and what the matrix holds; the source is opened already.

    Attributes
    ----------
    match
        How the source's genes were matched, a `GeneMatch`.
    detected
        What the matrix holds, and why we think so.

    Raises
    ------
    InputError
        If no gene matches, or the matrix is not what was expected.
    """

    def __init__(
        self,
        source: CellSource,
        vocabulary: GeneVocabulary,
        config: CellPatchConfig,
        reading: Reading,
    ) -> None:
        self.source = source
        self.name, self.n_cells, self.n_genes = source.name, source.n_cells, source.n_genes
        self.match = vocabulary.match_var(source.var, reading.gene_column, source.name)
        self.genes_matched, self.genes_unknown = self.match.matched, len(self.match.unknown)
        self.genes_duplicated = len(self.match.duplicated)
        self.genes_ambiguous = len(self.match.ambiguous)
        self.preprocessing = Preprocessing.from_config(config)
        self.vocabulary_fingerprint = vocabulary.fingerprint
        self._vocabulary_size = vocabulary.size
        sample = sample_of(source)
        self._sampled_entries = len(sample.data) / len(sample)  # of a cell
        self.detected = detect_in(source, sample, reading.input, config.target_sum)
        warn_if_selected(source, sample, self.detected, self.match, vocabulary)
        self.kind: str = self.detected.kind
        self._rows: Rows | None = None

    def rows(self) -> Rows:
        """How to read the cells. A matrix that is stored by genes is turned into rows here."""
        if self._rows is None:
            # where the user has said what all cells hold, nothing is expected of them
            requested = self.detected.requested
            tokenizing = partial(
                tokenize,
                tokens=np.asarray(self.match.tokens),
                preprocessing=self.preprocessing,
                kind=self.detected.kind,
                vocabulary_size=self._vocabulary_size,
                name=self.name,
                gene_names=self.source.var.index,
                expectation=None if requested else Expectation(self.detected, self.name),
            )
            types = token_types(self.preprocessing, self._vocabulary_size)
            self._rows = MatrixRows(self.source.matrix.reader(), types, tokenizing)
        return self._rows

    def measured(self) -> np.ndarray:
        """bool [1, vocabulary size]: the tokens whose gene was measured."""
        table = np.zeros((1, self._vocabulary_size), bool)
        tokens = np.asarray(self.match.tokens)
        table[0, tokens[tokens >= 0]] = True
        return table

    def input_of_cells(self) -> np.ndarray:
        """int64 [cells]: the row of `measured` that each cell belongs to."""
        return np.zeros(self.n_cells, np.int64)

    def expected_entries(self) -> int:
        """The entries of all cells, about: a dense matrix does not say how many there are."""
        entries = self.source.matrix.entries
        if entries is None:
            entries = int(self._sampled_entries * self.n_cells)
        return entries

    def obs_table(self) -> Table:
        return self.source.obs_table()

    def fingerprint(self) -> str:
        """Changes when the input does."""
        return self.source.fingerprint()

    def __str__(self) -> str:
        return f"{self.name}: {self.match}; {self.detected.reason}"

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
        self.source.close()


class TokenStream:
    """The cells of a token store, if they fit a model.

    Parameters
    ----------
    store
        The store; closed with this.
    vocabulary, config
        The model's, where it is known.

    Raises
    ------
    InputError
        If the store was made with another vocabulary or preprocessing.
    """

    def __init__(
        self,
        store: TokenStore,
        vocabulary: GeneVocabulary | None = None,
        config: CellPatchConfig | None = None,
    ) -> None:
        self.store = store
        self.name, self.n_cells = store.name, store.n_cells
        self.preprocessing, self.kind = store.preprocessing, "tokens"
        self.vocabulary_fingerprint = store.vocabulary_fingerprint
        if vocabulary is not None and vocabulary.fingerprint != store.vocabulary_fingerprint:
            raise InputError(
                f"{store.name} was made with another vocabulary (fingerprint "
                f"{store.vocabulary_fingerprint[:12]}, the model's is "
                f"{vocabulary.fingerprint[:12]}). Make the token store anew with this model "
                "(cellpatch tokenize --model)."
            )
        if config is not None and Preprocessing.from_config(config) != store.preprocessing:
            raise InputError(
                f"{store.name} was made with {store.preprocessing}, but the model expects "
                f"{Preprocessing.from_config(config)}. Make the token store anew for this model: "
                "cellpatch tokenize --model DIR; for a new model that is made with --few-cells, "
                "cellpatch tokenize --few-cells; for a new one without, neither option."
            )
        self.genes_matched = self.n_genes = int(store.measured().any(axis=0).sum())
        # The others were counted when the store was made.
        self.genes_unknown = self.genes_duplicated = self.genes_ambiguous = 0
        self._rows = TokenRows(store.name, store.offsets, store.genes, store.values)

    def rows(self) -> Rows:
        return self._rows

    def measured(self) -> np.ndarray:
        """bool [inputs of the store, vocabulary size]: the tokens whose gene each measured."""
        return self.store.measured()

    def input_of_cells(self) -> np.ndarray:
        """int64 [cells]: the row of `measured` that each cell belongs to."""
        inputs = self.store.inputs
        if len(inputs) == 1:
            return np.zeros(self.n_cells, np.int64)
        column = read_column([self.obs_table()], [self.name], SOURCE_COLUMN)
        assert column.categories is not None
        rows = np.array([inputs.index(name) for name in column.categories], np.int64)
        return rows[column.values]

    def expected_entries(self) -> int:
        """The entries of all cells."""
        return int(self.store.offsets[-1])

    def obs_table(self) -> Table:
        return self.store.obs_table()

    def fingerprint(self) -> str:
        return self.store.fingerprint()

    def __str__(self) -> str:
        return f"{self.name}: tokens of {self.genes_matched:,} genes"

    def close(self) -> None:
        self._rows.close()
        self.store.close()


Stream = CellStream | TokenStream


def open_stream(
    data: str | Path | AnnData,
    vocabulary: GeneVocabulary | None,
    config: CellPatchConfig | None,
    reading: Reading = Reading(),
) -> Stream:
    """Open a token store, or AnnData, 10x output or an AnnData object, for reading.

    Raises
    ------
    InputError
        If it cannot be read or does not fit the vocabulary and the configuration; or there are
        options of reading for a token store, which has none.
    """
    if isinstance(data, str | Path) and is_token_store(data):
        given = reading.given()
        if given:
            raise InputError(
                f"{data} is a token store, which has no {' and no '.join(given)}: leave that out"
            )
        return TokenStream(TokenStore(data), vocabulary, config)
    if vocabulary is None or config is None:
        raise InputError(
            f"{data} is no token store, so reading it needs a model's vocabulary and config"
        )
    source = open_source(data, layer=reading.layer, use_raw=reading.use_raw)
    try:
        return CellStream(source, vocabulary, config, reading)
    except BaseException:
        source.close()
        raise


def detect_in(
    source: CellSource, sample: CellBlock, expected: Expected, target_sum: float
) -> Detected:
    """What a source holds, told from a sample of it; see `detect_input`."""
    return detect_input(
        sample,
        source.name,
        expected,
        target_sum=target_sum,
        gene_names=source.var.index,
        n_cells=source.n_cells,
    )


def warn_if_selected(
    source: CellSource,
    sample: CellBlock,
    detected: Detected,
    match: GeneMatch,
    vocabulary: GeneVocabulary,
) -> None:
    """Warn if the genes of a source are a selection and its values depend on that."""
    if not detected.sums_matter:
        return
    counts = detected.kind == "counts" and source.n_cells <= TOTALS_CELLS
    obs = source.obs_table() if counts else None
    shown = selection_of_genes(source.var, match, vocabulary, sample, obs)
    if shown:
        warn_of_selection(detected, source.name, source.n_genes, shown)


def sample_of(source: CellSource) -> CellBlock:
    """Runs of cells from all over a source, enough to tell what its matrix holds.

    A run costs the chunks that it lies in, so there are fewer runs where chunks are large.
    """
    matrix = source.matrix
    runs = 1 if source.n_cells <= SAMPLE_CELLS else SAMPLE_RUNS
    if isinstance(matrix, CsrMatrix | DenseMatrix):
        runs = max(1, min(runs, SAMPLE_BYTES // _run_bytes(matrix)))
    length = -(-min(SAMPLE_CELLS, source.n_cells) // runs)
    starts = [run * source.n_cells // runs for run in range(runs)]
    read = source.read_cells(
        [(start, start + length) for start in starts],
        max_entries=SAMPLE_VALUES if isinstance(matrix, DenseMatrix) else SAMPLE_ENTRIES // runs,
        whole=False,
    )
    blocks = [_shortened(block, SAMPLE_ENTRIES // runs) for block in read]
    ends = np.cumsum([0, *(len(block.data) for block in blocks)])
    return CellBlock(
        start=0,
        indptr=np.concatenate(
            [[0], *(block.indptr[1:] + end for block, end in zip(blocks, ends, strict=False))]
        ),
        indices=np.concatenate([block.indices for block in blocks]),
        data=np.concatenate([block.data for block in blocks]),
        positions=np.concatenate([np.arange(block.start, block.stop) for block in blocks]),
    )


def _shortened(block: CellBlock, entries: int) -> CellBlock:
    """The block's first cells, with up to so many entries, one cell at least."""
    cells = max(1, int(np.searchsorted(block.indptr, entries, side="right")) - 1)
    indptr = block.indptr[: cells + 1]
    return replace(
        block, indptr=indptr, indices=block.indices[: indptr[-1]], data=block.data[: indptr[-1]]
    )


def _run_bytes(matrix: CsrMatrix | DenseMatrix) -> int:
    """What a short run of cells costs, about: a chunk of every array."""
    if isinstance(matrix, DenseMatrix):
        chunk = 1 if isinstance(matrix.array, np.ndarray) else matrix.array.chunk
        return chunk * matrix.shape[1] * matrix.dtype.itemsize
    arrays = (matrix.indices, matrix.data)
    return sum(
        (1 if isinstance(array, np.ndarray) else array.chunk) * array.dtype.itemsize
        for array in arrays
    )


def describe_input(path: Path | str, stream: Stream) -> str:
    """An input, for people; another string if anything about it is different."""
    return (
        f"{Path(path).name}: {stream.n_cells} cells, {stream.n_genes} genes, {stream.kind}, "
        f"fingerprint {stream.fingerprint()[:16]}"
    )
