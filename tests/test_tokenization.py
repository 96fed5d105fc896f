"""`atlas.tokenize`: files in, one token store with scanpy's values out, whatever happens."""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
import re
import shutil
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch

import cellpatch_fast as cp
from cellpatch_fast import (
    CellPatch,
    CellPatchConfig,
    GeneVocabulary,
    InputError,
    RaggedCells,
    streams,
    tokenization,
)
from cellpatch_fast.io import TokenStore, obs, token_writer
from cellpatch_fast.io.buckets import Buckets
from cellpatch_fast.io.partial import partial_of
from cellpatch_fast.io.token_writer import TokenWriter

from .conftest import GENES, MakeCells, tree, write_zarr
from .io.tokens import read_chunks

CELLS = 211
CONTINUOUS = CellPatchConfig(value_rounding="none", value_clip=None)


class SmallWriter(TokenWriter):
    """Chunks of 53 entries, shards of 3 chunks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, chunk_entries=53, shard_chunks=3, **options)


class SmallBuckets(Buckets):
    """About 10 buckets, with as many checkpoints."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(
            *arguments, bucket_bytes=4_001, gathered_bytes=1_999, checkpoint_bytes=3_001
        )


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, chunks, shards and buckets that cells do not line up with."""
    monkeypatch.setattr(tokenization, "MAX_ENTRIES", 401)
    monkeypatch.setattr(tokenization, "TokenWriter", SmallWriter)
    monkeypatch.setattr(token_writer, "WAITING_CHUNKS", 4)
    monkeypatch.setattr(tokenization, "Buckets", SmallBuckets)
    monkeypatch.setattr(obs, "ROWS", 17)
    monkeypatch.setattr(obs, "SORTED_ROWS", 83)


Tokenize = Callable[..., RaggedCells]


@pytest.fixture
def tokenize(small_vocabulary: GeneVocabulary, output: Path) -> Tokenize:
    """``tokenize(inputs, **options)``: the cells in the finished store."""

    def run(inputs: Any, **options: Any) -> RaggedCells:
        cp.atlas.tokenize(inputs, output, **{"vocabulary": small_vocabulary} | options)
        return read_cells(output)

    return run


def read_cells(path: Path) -> RaggedCells:
    with TokenStore(path) as store:
        arrays = (store.offsets, read_chunks(store.genes), read_chunks(store.values))
        return RaggedCells(*map(torch.from_numpy, arrays))


def by_scanpy(
    adata: anndata.AnnData, vocabulary: GeneVocabulary, discrete: bool = True
) -> pd.DataFrame:
    """Values by cell and token, of the expressed genes that the vocabulary has."""
    adata = anndata.AnnData(adata.X.astype(np.float64), var=adata.var)
    expressed = (adata.X != 0).toarray()
    with warnings.catch_warnings(action="ignore"):  # there is an empty cell
        sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    values = adata.X.toarray()
    values = np.rint(values.clip(max=5)) if discrete else values.astype(np.float32)
    tokens = vocabulary.match(adata.var_names).tokens
    cells, genes = np.nonzero(expressed & (tokens >= 0))
    table = pd.DataFrame({"cell": cells, "token": tokens[genes], "value": values[cells, genes]})
    return table.sort_values(["cell", "token"], ignore_index=True)


def as_table(cells: RaggedCells) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "cell": np.repeat(np.arange(len(cells)), cells.lengths.numpy()),
            "token": cells.genes.numpy().astype(np.int32),
            "value": cells.values.numpy().astype(np.float64),
        }
    )


def assert_same(cells: RaggedCells, other: RaggedCells) -> None:
    for found, expected in (
        (cells.offsets, other.offsets),
        (cells.genes, other.genes),
        (cells.values, other.values),
    ):
        assert found.dtype == expected.dtype
        assert np.array_equal(found.numpy(), expected.numpy())


def test_store_holds_what_scanpy_makes(
    tokenize: Tokenize, cells_file: Path, small_vocabulary: GeneVocabulary
) -> None:
    adata = anndata.read_h5ad(cells_file)
    cells = tokenize(cells_file)
    assert cells.values.dtype == torch.uint8
    pd.testing.assert_frame_equal(as_table(cells), by_scanpy(adata, small_vocabulary))
    assert cells.lengths[0] == 0
    assert cells.lengths[-1] == GENES


def test_continuous_values_are_scanpys_in_half_precision(
    tokenize: Tokenize, cells_file: Path, small_vocabulary: GeneVocabulary
) -> None:
    cells = tokenize(cells_file, config=CONTINUOUS)
    assert cells.values.dtype == torch.float16
    expected = by_scanpy(anndata.read_h5ad(cells_file), small_vocabulary, discrete=False)
    found = as_table(cells)
    pd.testing.assert_frame_equal(found.drop(columns="value"), expected.drop(columns="value"))
    np.testing.assert_allclose(found["value"], expected["value"], rtol=2**-11, atol=0)


@pytest.mark.parametrize(
    ("container", "layout"),
    [("zarr-v3", "csr"), ("h5ad", "csc"), ("zarr-v3", "dense"), ("layer", "csr"), ("raw", "csc")],
)
def test_same_tokens_from_every_kind_of_file(
    tokenize: Tokenize,
    make_cells: MakeCells,
    small_vocabulary: GeneVocabulary,
    tmp_path: Path,
    container: str,
    layout: str,
) -> None:
    adata = make_cells(31)
    del adata.raw
    expected = by_scanpy(adata, small_vocabulary)
    adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[layout]
    options: dict[str, Any] = {}
    if container == "layer":
        adata.layers["counts"], adata.X = adata.X, adata.layers["other"]
        options = {"layer": "counts"}
    elif container == "raw":
        adata.raw = adata
        adata = adata[:, :5].copy()
        options = {"use_raw": True}
    path = tmp_path / ("cells.zarr" if container == "zarr-v3" else "cells.h5ad")
    write_zarr(adata, path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    cells = tokenize(path, shuffle=layout == "dense", **options)
    if layout == "dense":
        rows = np.random.default_rng(0).permutation(31)
        cells = cells.take(torch.from_numpy(rows))
    pd.testing.assert_frame_equal(as_table(cells), expected)


@pytest.fixture
def three_files(make_cells: MakeCells, tmp_path: Path) -> list[Path]:
    """Different genes in different orders, different columns of obs."""
    parts = [make_cells(33, 1)[:, 50:].copy(), make_cells(50, 2), make_cells(7, 3)[:, ::-1].copy()]
    del parts[0].obs["depth"]
    parts[1].obs["batch"] = "second"
    paths = [tmp_path / f"part{number}.h5ad" for number in range(3)]
    for part, path in zip(parts, paths, strict=True):
        part.write_h5ad(path)
    return paths


def test_inputs_with_different_genes_are_aligned(
    tokenize: Tokenize,
    three_files: list[Path],
    small_vocabulary: GeneVocabulary,
    output: Path,
) -> None:
    found = as_table(tokenize(three_files))
    parts = [anndata.read_h5ad(path) for path in three_files]
    starts = np.cumsum([0, *map(len, parts)])
    expected = [by_scanpy(part, small_vocabulary) for part in parts]
    for table, start in zip(expected, starts[:-1], strict=True):
        table["cell"] += start
    pd.testing.assert_frame_equal(found, pd.concat(expected, ignore_index=True))
    with TokenStore(output) as store:
        assert store.inputs == [str(path) for path in three_files]
        after, measured = store.read_obs(), store.measured()
    assert after.index.tolist() == [name for part in parts for name in part.obs_names]
    assert after["cellpatch_input"].tolist() == np.repeat(store.inputs, [33, 50, 7]).tolist()
    assert after["depth"].isna().sum() == 33
    for row, part in zip(measured, parts, strict=True):
        tokens = small_vocabulary.match(part.var_names).tokens
        assert np.array_equal(np.flatnonzero(row), np.unique(tokens[tokens >= 0]))
    assert measured.sum(1).tolist() == [GENES - 50, GENES, GENES]


@pytest.mark.parametrize("config", [CellPatchConfig(), CONTINUOUS])
def test_shuffled_store_is_a_permutation_of_cells_and_obs(
    tokenize: Tokenize, three_files: list[Path], output: Path, config: CellPatchConfig
) -> None:
    """As in memory: cell ``c`` goes to the row ``permutation[c]``."""
    cells = tokenize(three_files, config=config)
    with TokenStore(output) as store:
        before = store.read_obs()
        counts = store.counts
    shuffled = tokenize(three_files, config=config, shuffle=True, seed=5, overwrite=True)
    rows = np.random.default_rng(5).permutation(90)
    order = np.argsort(rows)
    assert (order != np.arange(90)).sum() > 80
    assert_same(shuffled, cells.take(torch.from_numpy(order)))
    with TokenStore(output) as store:
        pd.testing.assert_frame_equal(store.read_obs(), before.iloc[order])
        assert (store.shuffled, store.counts) == (5, counts)


def test_input_behind_an_address(
    tokenize: Tokenize, make_cells: MakeCells, tmp_path: Path, output: Path
) -> None:
    pytest.importorskip("fsspec")
    path = write_zarr(make_cells(31), tmp_path / "cells.zarr")
    expected = tokenize(path)
    with TokenStore(output) as store:
        assert store.inputs == [str(path)]
    assert_same(tokenize(path.as_uri(), overwrite=True), expected)
    with TokenStore(output) as store:
        assert store.inputs == [path.as_uri()]
        assert store.describe()["inputs"][0].startswith("cells.zarr: 31 cells")
    with pytest.raises(InputError, match="given twice"):
        tokenize([path.as_uri(), path.as_uri() + "/"])
    with pytest.raises(InputError, match="is an address: stores are written to folders"):
        cp.atlas.tokenize(path, output.as_uri(), vocabulary="human")


def test_a_seed_is_one_order(tokenize: Tokenize, cells_file: Path, output: Path) -> None:
    trees = []
    for seed in (3, 3, 4):
        tokenize(cells_file, shuffle=True, seed=seed)
        trees.append(tree(output))
        shutil.rmtree(output)
    assert trees[0] == trees[1] != trees[2]


class Stopped(Exception):
    """Ends a run early."""


def stop_in(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: int
) -> pytest.MonkeyPatch:
    """The ``calls``-th next call of a method raises."""
    method, left = getattr(owner, name), [calls]

    def stopping(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return method(*arguments)

    monkeypatch.setattr(owner, name, stopping)
    return monkeypatch


@pytest.mark.parametrize(
    ("shuffle", "owner", "method", "most"),
    [
        pytest.param(False, TokenWriter, "append", 22, id="in order"),
        pytest.param(False, TokenWriter, "_keep", 45, id="in order, while a shard is kept"),
        pytest.param(True, Buckets, "append", 22, id="shuffled, while reading"),
        pytest.param(True, Buckets, "_checkpoint", 8, id="shuffled, at a checkpoint"),
        pytest.param(True, TokenWriter, "append", 6, id="shuffled, while writing"),
        pytest.param(True, TokenWriter, "_keep", 45, id="shuffled, while a shard is kept"),
    ],
)
def test_interrupted_run_ends_with_the_same_bytes(
    cells_file: Path,
    small_vocabulary: GeneVocabulary,
    tmp_path: Path,
    shuffle: bool,
    owner: type,
    method: str,
    most: int,
) -> None:
    run = functools.partial(
        cp.atlas.tokenize, cells_file, vocabulary=small_vocabulary, shuffle=shuffle, seed=1
    )
    run(tmp_path / "uninterrupted.zarr")
    chance, output = random.Random(most), tmp_path / "resumed.zarr"
    for part in (2, 6):  # the later run has less to do
        with pytest.MonkeyPatch.context() as patch:
            stop_in(patch, owner, method, chance.randint(0, most // part))
            with pytest.raises(Stopped):
                run(output)
        assert not output.exists()
        threads = {thread.name.rsplit("_", 1)[0] for thread in threading.enumerate()}
        assert not threads & {"cellpatch-write", "cellpatch-encode"}
    summary = run(output)
    assert tree(output) == tree(tmp_path / "uninterrupted.zarr")
    assert not partial_of(output).exists()
    assert summary.empty_cells == 1
    assert summary.tokenized <= CELLS


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_run_does_not_begin_anew(
    cells_file: Path, small_vocabulary: GeneVocabulary, output: Path, shuffle: bool
) -> None:
    run = functools.partial(
        cp.atlas.tokenize, cells_file, output, vocabulary=small_vocabulary, shuffle=shuffle
    )
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, TokenWriter, "append", 3 if shuffle else 15)
        with pytest.raises(Stopped):
            run()
    summary = run()
    assert summary.tokenized == 0 if shuffle else 0 < summary.tokenized < CELLS // 2
    assert "of them earlier)" in str(summary)
    assert str(summary).endswith("1 empty cells" if shuffle else " cells/s")


@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "state"])
def test_damaged_buckets_are_refused(
    cells_file: Path, small_vocabulary: GeneVocabulary, output: Path, damage: str
) -> None:
    run = functools.partial(
        cp.atlas.tokenize, cells_file, output, vocabulary=small_vocabulary, shuffle=True
    )
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, TokenWriter, "append", 0)
        with pytest.raises(Stopped):
            run()
    folder = partial_of(output) / "work" / "buckets"
    bucket = folder / "2"
    content = bucket.read_bytes()
    if damage == "gone":
        bucket.unlink()
    elif damage == "cut":
        bucket.write_bytes(content[:-1])
    elif damage == "changed":  # two cells of the same row
        bucket.write_bytes(content[:16] + content[20:24] + content[20:])
    else:
        (folder / "buckets.json").write_text("{")
    with pytest.raises(InputError) as caught:
        run()
    assert str(caught.value).startswith(str(folder))
    assert f"start anew: {partial_of(output)}" in str(caught.value)
    assert not output.exists()
    shutil.rmtree(partial_of(output))
    run()


def test_no_room_for_the_copy(
    tokenize: Tokenize, cells_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(InputError, match=r"shuffling needs .* GB .* 0\.0 GB are free there: free"):
        tokenize(cells_file, shuffle=True)
    assert not output.exists()
    monkeypatch.undo()
    tokenize(cells_file, shuffle=True)


def test_model_and_its_vocabulary_make_the_same_store(
    tokenize: Tokenize,
    cells_file: Path,
    small_model: CellPatch,
    model_directory: Path,
    output: Path,
) -> None:
    """What a store depends on is the vocabulary and the preprocessing, not the weights."""
    tokenize(cells_file)
    for model in (small_model, model_directory):
        assert cp.atlas.tokenize(cells_file, output, model=model).tokenized == 0
    path = model_directory / "vocabulary.json"
    assert cp.atlas.tokenize(cells_file, output, vocabulary=path).tokenized == 0


def test_human_vocabulary(cells_file: Path, output: Path) -> None:
    cp.atlas.tokenize(cells_file, output, vocabulary="human")
    with TokenStore(output) as store:
        assert store.vocabulary_fingerprint == GeneVocabulary.human().fingerprint


def test_summary(
    cells_file: Path,
    small_vocabulary: GeneVocabulary,
    output: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adata = anndata.read_h5ad(cells_file)
    with caplog.at_level(logging.INFO, "cellpatch_fast"):
        summary = cp.atlas.tokenize(str(cells_file), str(output), vocabulary=small_vocabulary)
    assert (summary.cells, summary.tokenized, summary.empty_cells) == (CELLS, CELLS, 1)
    assert (summary.genes_matched, summary.genes_unknown) == (GENES, 3)
    assert summary.unknown_entries == adata.X[:, GENES:].nnz
    assert summary.entries == adata.X[:, :GENES].nnz
    assert re.fullmatch(
        rf"{re.escape(str(output))}: 211 cells, {summary.entries:,} entries, 307 genes matched, "
        r"3 unknown, 1 empty cells, [\d,]+ cells/s",
        str(summary),
    )
    (line,) = caplog.messages
    assert line.startswith(f"{cells_file}: {GENES} of {GENES + 3} genes matched by the var index")


def test_repeating_a_finished_run_does_nothing(
    cells_file: Path, small_vocabulary: GeneVocabulary, output: Path
) -> None:
    first = cp.atlas.tokenize(cells_file, output, vocabulary=small_vocabulary)
    times = {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]}
    second = cp.atlas.tokenize(cells_file, output, vocabulary=small_vocabulary)
    assert {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]} == times
    assert str(second) == f"{output} is complete already: 211 cells, nothing to do"
    assert second == dataclasses.replace(first, tokenized=0, seconds=0.0)


@pytest.mark.parametrize(
    ("finished", "options", "named"),
    [
        (False, {"layer": "other"}, "layer: was '', is now 'other'"),
        (True, {"use_raw": True}, "use_raw: was False, is now True"),
        (False, {"config": CONTINUOUS}, "value_rounding: was 'round', is now 'none'"),
        (True, {"config": CellPatchConfig(target_sum=1e3)}, "target_sum: was 10000.0, is now 1"),
        (True, {"vocabulary": "human"}, "vocabulary: was "),
        (False, {"shuffle": True, "seed": 2}, "shuffle: was '', is now 'with seed 2'"),
    ],
)
def test_changed_setting_is_refused_and_named(
    tokenize: Tokenize,
    cells_file: Path,
    output: Path,
    finished: bool,
    options: dict[str, Any],
    named: str,
) -> None:
    if finished:
        tokenize(cells_file)
    else:
        with pytest.MonkeyPatch.context() as patch:
            stop_in(patch, TokenWriter, "append", 3)
            with pytest.raises(Stopped):
                tokenize(cells_file)
    where = output if finished else partial_of(output)
    before = tree(where)
    with pytest.raises(InputError) as caught:
        tokenize(cells_file, **options)
    message, *changes = str(caught.value).splitlines()
    assert str(where) in message
    assert "other settings" in message
    assert f"  {named}" in "\n".join(changes)
    assert tree(where) == before
    tokenize(cells_file, overwrite=True, **options)


def test_changed_input_is_refused(tokenize: Tokenize, cells_file: Path) -> None:
    tokenize(cells_file)
    adata = anndata.read_h5ad(cells_file)
    adata[:-1].copy().write_h5ad(cells_file)
    with pytest.raises(InputError, match=r"inputs: was \['cells.h5ad: 211 cells.*is now.* 210"):
        tokenize(cells_file)


def test_what_cannot_be(
    tokenize: Tokenize, cells_file: Path, small_model: CellPatch, output: Path, tmp_path: Path
) -> None:
    wrong: dict[str, Any]
    for wrong, message in (
        ({"vocabulary": None}, "give either a model or a vocabulary"),
        ({"model": small_model}, "give either a model or a vocabulary"),
        ({"model": small_model, "vocabulary": None, "config": CONTINUOUS}, "no config beside it"),
        ({"vocabulary": tmp_path / "none.json"}, "none.json: cannot be read"),
        ({"seed": -1}, "the seed must be at least 0, found -1"),
        ({"layer": "none"}, "no layer 'none'"),
    ):
        with pytest.raises(InputError, match=message):
            tokenize(cells_file, **wrong)
    with pytest.raises(InputError, match="given twice"):
        tokenize([cells_file, cells_file])
    assert not output.exists()
    assert not partial_of(output).exists()
    tokenize(cells_file)
    with pytest.raises(InputError, match="is a token store already"):
        cp.atlas.tokenize(output, tmp_path / "again.zarr", vocabulary="human")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_token_store_is_never_replaced(
    tokenize: Tokenize, cells_file: Path, small_model: CellPatch, output: Path, overwrite: bool
) -> None:
    cp.atlas.embed(cells_file, small_model, output)
    before = tree(output)
    with pytest.raises(InputError, match="exists and is not a token store, so it is not replaced"):
        tokenize(cells_file, overwrite=overwrite)
    assert tree(output) == before


def test_value_beyond_half_precision_is_refused(
    tokenize: Tokenize, cells_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in a file whose first cells look like logarithms there can be so large ones."""
    monkeypatch.setattr(streams, "SAMPLE_CELLS", 100)
    adata = anndata.read_h5ad(cells_file)
    adata.X = adata.X.log1p()
    adata.X.data[-5] = 1e5  # of a known gene, in the last cell
    adata.write_h5ad(cells_file)
    for shuffle in (False, True):
        with pytest.raises(InputError, match=r"cell 210 .* the value 100000, .* float16"):
            tokenize(cells_file, config=CONTINUOUS, input="lognorm", shuffle=shuffle)
        assert not output.exists()
        shutil.rmtree(partial_of(output))


def test_dense_files_are_sized_by_a_sample(
    tokenize: Tokenize, make_cells: MakeCells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else shuffling one would ask for room for its zeros."""
    adata = make_cells(101)
    adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "dense.h5ad")
    asked: list[int] = []

    def buckets(folder: Path, rows: np.ndarray, entries: int, *types: Any) -> Buckets:
        asked.append(entries)
        return Buckets(folder, rows, entries, *types)

    monkeypatch.setattr(tokenization, "Buckets", buckets)
    tokenize(tmp_path / "dense.h5ad", shuffle=True)
    assert asked == [np.count_nonzero(adata.X)]
