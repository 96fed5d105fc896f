"""Reordering a CSC matrix on disk leaves nothing behind and says when the disk is too small."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from cellpatch_fast.errors import InputError
from cellpatch_fast.io.sources.source import open_source

from ..conftest import GENES, counts, replace
from .test_source import TOO_LITTLE_MEMORY, Store, all_of, assert_same


def test_nothing_is_left_in_the_temporary_folder(
    stored: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored("h5ad", "csc")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with open_source(path, memory_limit=TOO_LITTLE_MEMORY) as source:
        blocks = source.read_cells(max_entries=50)
        next(blocks)
        assert list((tmp_path / "temporary").iterdir()) == []  # not even while in use


def test_disk_too_small_for_reordering(tmp_path: Path) -> None:
    """A file that claims to have 10**13 entries, none of which is stored."""
    entries, genes = 10**13, 5
    path = tmp_path / "huge.h5ad"
    anndata.AnnData(sparse.csc_matrix((7, genes), dtype=np.float32)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for key, dtype in (("X/indices", np.int32), ("X/data", np.float32)):
            del file[key]
            file.create_dataset(key, (entries,), dtype, chunks=(10**6,))
    replace(path, "X/indptr", lambda _: np.linspace(0, entries, genes + 1).astype(np.int64))
    with open_source(path) as source, pytest.raises(InputError) as caught:
        next(source.read_cells())
    message = str(caught.value)
    assert str(path) in message
    assert "needs 80000.0 GB" in message
    assert "TMPDIR" in message


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_object_in_memory_is_reordered_on_disk(order: str) -> None:
    """Of either byte order: what is in the temporary file has the machine's."""
    expected = counts(GENES, 1)
    matrix = expected.tocsc()
    matrix.data = matrix.data.astype(f"{order}f4")
    adata = anndata.AnnData(matrix)
    assert adata.X.data.dtype.byteorder == np.dtype(f"{order}f4").byteorder
    with open_source(adata, memory_limit=TOO_LITTLE_MEMORY) as source:
        assert_same(all_of(source, max_entries=89), expected)


FULL_DISK = """
import resource, sys
from cellpatch_fast.errors import InputError
from cellpatch_fast.io.sources.source import open_source

with open_source(sys.argv[1], memory_limit=5_000) as source:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
    try:
        next(source.read_cells())
    except InputError as error:
        print(error)
"""


def test_disk_that_fills_up_while_reordering(stored: Store) -> None:
    path = stored("h5ad", "csc")
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{path} (X): cannot write its temporary copy" in done.stdout
    assert "TMPDIR" in done.stdout
