"""The same cells as a file and as a token store, and in every format, for tests of loading."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import pytest
import zarr

from cellpatch_fast import CellPatch, GeneVocabulary, RaggedCells, atlas, pp
from cellpatch_fast.io.stores.token_writer import TokenWriter

from ..conftest import MakeCells, tokenizing, write_zarr
from ..io.stores.token_files import write_store
from .batches import CELLS, CHUNK, SHARD_CHUNKS, Files

MakeStore = Callable[..., Path]


class SmallWriter(TokenWriter):
    """Chunks of 211 entries, shards of 7 chunks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, chunk_entries=211, shard_chunks=7, **options)


@pytest.fixture(scope="module")
def adata(make_cells: MakeCells) -> anndata.AnnData:
    return make_cells(CELLS)


@pytest.fixture(scope="module")
def file(adata: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("anndata") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def make_store(
    small_vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory
) -> MakeStore:
    """``make_store(inputs, **options)``: by `atlas.tokenize`, in chunks that cells cross."""

    def make(inputs: Path | list[Path], **options: Any) -> Path:
        output = tmp_path_factory.mktemp("stores") / "tokens.zarr"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizing, "TokenWriter", SmallWriter)
            atlas.tokenize(inputs, output, **{"vocabulary": small_vocabulary} | options)
        return output

    return make


@pytest.fixture(scope="module")
def store(make_store: MakeStore, file: Path) -> Path:
    return make_store(file)


@pytest.fixture(scope="module")
def tokens(adata: anndata.AnnData, small_model: CellPatch) -> RaggedCells:
    return pp.tokenize(adata, small_model.vocabulary, small_model.config)


@pytest.fixture(scope="module")
def originals(
    adata: anndata.AnnData,
    tokens: RaggedCells,
    small_model: CellPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Files:
    """The same cells in every format, many windows long."""
    folder = tmp_path_factory.mktemp("originals")
    files = {name: folder / name for name in ("tokens.zarr", "cells.zarr", "cells.h5ad")}
    write_store(
        files["tokens.zarr"],
        tokens,
        vocabulary=small_model.vocabulary,
        chunk_entries=CHUNK,
        shard_chunks=SHARD_CHUNKS,
    )
    write_zarr(adata, files["cells.zarr"])
    in_small_chunks(files["cells.zarr"])
    adata.write_h5ad(files["cells.h5ad"], compression="gzip")
    return files


def in_small_chunks(path: Path) -> None:
    root = zarr.open_group(path)
    for part in ("indices", "data"):
        array: Any = root[f"X/{part}"]
        options: dict[str, Any] = {
            "attributes": dict(array.attrs),
            "chunks": (CHUNK * SHARD_CHUNKS,),
        }
        root.create_array(f"X/{part}", data=array[:], overwrite=True, **options)
    zarr.consolidate_metadata(root.store)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch."""
    monkeypatch.setattr("cellpatch_fast.loading.loader.WINDOW_BYTES", 1)


@pytest.fixture
def watchdog() -> Iterator[None]:
    """A test that hangs ends the run, and says where."""
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()
