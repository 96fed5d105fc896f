"""`atlas.embed` goes on with and replaces only what it may, and says why it does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
import zarr

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, GeneVocabulary, InputError
from cellpatch_fast.io.stores import embeddings
from cellpatch_fast.io.stores.partial import PartialStore, partial_of

from ..conftest import MakeCells, stopped_after, tree, write_zarr

CELLS = 211
KEY = "X_cellpatch"


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 20 cells."""
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 20)
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 1)


@pytest.fixture
def begun(cells_file: Path, small_model: CellPatch, output: Path) -> Path:
    """An output with unfinished work of 3 shards."""
    with stopped_after(3):
        cp.atlas.embed(cells_file, small_model, output)
    return output


def changed_weights(model: CellPatch) -> CellPatch:
    other = CellPatch(model.config, model.vocabulary)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.patches[0, 0] += 1e-6
    return other.eval()


def changed_vocabulary(model: CellPatch) -> CellPatch:
    ids, symbols = list(model.vocabulary.ensembl_ids), list(model.vocabulary.symbols)
    ids[0], ids[1], symbols[0], symbols[1] = ids[1], ids[0], symbols[1], symbols[0]
    other = CellPatch(model.config, GeneVocabulary(ids, symbols))
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_a_store_is_not_named_like_a_file(
    cells_file: Path, small_model: CellPatch, tmp_path: Path
) -> None:
    make_file = r"anndata.read_zarr\('e.zarr'\).write_h5ad\('e.h5ad'\) makes a file of it"
    with pytest.raises(
        InputError, match=f"e.h5ad is named like a file.*call it e.zarr.*{make_file}"
    ):
        cp.atlas.embed(cells_file, small_model, tmp_path / "e.h5ad")
    with pytest.raises(InputError, match=r"named like a file, but a store is .*call it t.zarr$"):
        cp.atlas.tokenize(cells_file, tmp_path / "t.H5")
    assert list(tmp_path.iterdir()) == [cells_file]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_weights, "model"),
        (changed_vocabulary, "vocabulary"),
        ({"layer": "other"}, "layer"),
        ({"use_raw": True}, "use_raw"),
        ({"pool": "mean"}, "pool"),
        ({"dtype": "float16"}, "dtype"),
        ({"backend": "reference"}, "backend"),
        ({"input": "lognorm"}, "inputs"),
    ],
)
def test_changed_setting_is_refused_and_named(
    begun: Path,
    cells_file: Path,
    small_model: CellPatch,
    change: Any,
    named: str,
    finished: bool,
) -> None:
    if finished:
        cp.atlas.embed(cells_file, small_model, begun)
    where = begun if finished else partial_of(begun)
    before = tree(where)
    model = change(small_model) if callable(change) else small_model
    options = {} if callable(change) else change
    if named == "inputs":  # whole numbers can be logarithms, if someone says so; small ones
        adata = anndata.read_h5ad(cells_file)
        adata.X.data[:] = 3
        adata.write_h5ad(cells_file)
    with pytest.raises(InputError) as caught:
        cp.atlas.embed(cells_file, model, begun, **options)
    message, *changes = str(caught.value).splitlines()
    assert str(where) in message
    assert "other settings" in message
    assert "--overwrite" in message
    assert f"  {named}: was " in "\n".join(changes)
    assert tree(where) == before


@pytest.mark.parametrize("finished", [False, True])
def test_input_with_another_time_is_the_same(
    begun: Path, cells_file: Path, small_model: CellPatch, finished: bool
) -> None:
    if finished:
        cp.atlas.embed(cells_file, small_model, begun)
    os.utime(cells_file, ns=(1, 1))
    summary = cp.atlas.embed(cells_file, small_model, begun)
    assert summary.computed == (0 if finished else CELLS - 60)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("command", [cp.atlas.embed, cp.atlas.tokenize])
def test_changed_labels_are_refused(
    make_cells: MakeCells,
    small_model: CellPatch,
    tmp_path: Path,
    command: Callable[..., Any],
    finished: bool,
) -> None:
    """They are in one chunk of obs, which has as many bytes as before."""
    cells, output = write_zarr(make_cells(), tmp_path / "cells.zarr"), tmp_path / "out.zarr"
    command(cells, output=output, model=small_model)
    if not finished:  # killed before it got its name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PartialStore, "_publish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                command(cells, output=output, model=small_model, overwrite=True)
        shutil.rmtree(output)
    codes = zarr.open_array(cells / "obs/kind/codes")
    codes[:] = (np.asarray(codes[:]) + 1) % 3
    with pytest.raises(InputError, match=r"inputs: was \['cells.zarr: 211 cells.*is now"):
        command(cells, output=output, model=small_model)


def interrupted(store: PartialStore) -> None:
    raise KeyboardInterrupt


def test_moved_input_is_recognised(
    begun: Path, cells_file: Path, small_model: CellPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / cells_file.name
    elsewhere.parent.mkdir()
    shutil.move(cells_file, elsewhere)
    summary = cp.atlas.embed(elsewhere, small_model, begun)
    assert summary.computed == CELLS - 60


def test_overwriting_replaces_a_store(
    begun: Path, cells_file: Path, small_model: CellPatch, tmp_path: Path
) -> None:
    cp.atlas.embed(cells_file, small_model, begun)
    summary = cp.atlas.embed(cells_file, small_model, begun, pool="mean", overwrite=True)
    assert summary.computed == CELLS
    assert zarr.open_array(begun / "obsm" / KEY).shape == (CELLS, 10)
    cp.atlas.embed(cells_file, small_model, tmp_path / "new.zarr", pool="mean")
    assert tree(begun) == tree(tmp_path / "new.zarr")


def test_overwriting_waits_for_inputs_that_can_be_used(
    begun: Path, cells_file: Path, small_model: CellPatch
) -> None:
    cp.atlas.embed(cells_file, small_model, begun)
    before = tree(begun)
    with pytest.raises(InputError, match="no layer"):
        cp.atlas.embed(cells_file, small_model, begun, layer="none", overwrite=True)
    broken = cells_file.with_name("broken.h5ad")
    adata = anndata.read_h5ad(cells_file)
    adata.X.data[-1] = -1
    adata.write_h5ad(broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellpatch_fast.loading.inputs.SAMPLE_CELLS", 100)
        with pytest.raises(InputError, match="the value is -1"):
            cp.atlas.embed(broken, small_model, begun, overwrite=True)
    assert tree(begun) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "cells", "home"])
def test_what_is_no_embedding_store_is_never_replaced(
    cells_file: Path,
    small_model: CellPatch,
    output: Path,
    kind: str,
    overwrite: bool,
) -> None:
    if kind == "cells":
        write_zarr(anndata.read_h5ad(cells_file), output)
    elif kind == "file":
        output.write_text("precious")
    else:
        (output / "thesis").mkdir(parents=True)
        (output / "thesis" / "chapter.tex").write_text("precious")
        output = output if kind == "folder" else output.parent
    before = tree(output.parent)
    with pytest.raises(InputError, match="exists and is not an embedding store, so it is not"):
        cp.atlas.embed(cells_file, small_model, output, overwrite=overwrite)
    assert tree(output.parent) == before


def test_output_that_cannot_be(cells_file: Path, small_model: CellPatch, tmp_path: Path) -> None:
    store = write_zarr(anndata.read_h5ad(cells_file), tmp_path / "cells.zarr")
    for inputs, output, message in (
        (cells_file, "", "'' cannot be the output"),
        (cells_file, "/", "'/' cannot be the output"),
        (cells_file, cells_file, "exists and is not an embedding store"),
        (store, store / "embedding.zarr", "lies within the input"),
        (store, store / "a" / ".." / "embedding.zarr", "lies within the input"),
    ):
        with pytest.raises(InputError, match=message):
            cp.atlas.embed(inputs, small_model, output, overwrite=True)


def test_output_is_where_the_user_says(
    cells_file: Path, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, in folders to be made, with a trailing slash, without .zarr, through a link."""
    monkeypatch.chdir(tmp_path)
    os.symlink(tmp_path / "target.zarr", tmp_path / "link.zarr")
    for output, made in (
        ("new/folder/out", "new/folder/out"),
        ("slash.zarr/", "slash.zarr"),
        ("link.zarr", "target.zarr"),
    ):
        cp.atlas.embed(cells_file.name, model_directory, output)
        assert anndata.read_zarr(tmp_path / made).n_obs == CELLS
        assert cp.atlas.embed(cells_file, model_directory, output).computed == 0
    assert (tmp_path / "link.zarr").is_symlink()


def test_inputs_that_cannot_be(cells_file: Path, small_model: CellPatch, output: Path) -> None:
    again = cells_file.parent / "." / ".." / cells_file.parent.name / cells_file.name
    wrong: Any
    for wrong, message in (
        ([], "no input was given"),
        ("", "name of an input is empty"),
        (anndata.read_h5ad(cells_file), "found AnnData .*tl.embed"),
        ([3], "found int"),
        ([cells_file, cells_file], "given twice"),
        ([cells_file, again], "given twice"),
    ):
        with pytest.raises(InputError, match=message):
            cp.atlas.embed(wrong, small_model, output)
    for options, message in (
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"pool": "max"}, "unknown pooling 'max'"),
    ):
        with pytest.raises(InputError, match=message):
            cp.atlas.embed(cells_file, small_model, output, **options)  # type: ignore[arg-type]
    assert not output.exists()
    assert not partial_of(output).exists()
