"""Some of the cells: their rows are those of a store of all cells, and their obs is with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, InputError, cli
from cellpatch_fast.atlas import selection
from cellpatch_fast.io.stores import embeddings, obs

from ..conftest import MakeCells, stopped_after, tree, write_zarr

CELLS = (211, 97)  # of two files
KEY = "X_cellpatch"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 20 cells; 17 strings are read, and 13 written, at a time."""
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 20)
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 1)
    monkeypatch.setattr(selection, "READ_ROWS", 17)
    monkeypatch.setattr(obs, "ROWS", 13)


@pytest.fixture
def files(make_cells: MakeCells, tmp_path: Path) -> list[Path]:
    """Two inputs, one of each format; the second has a column more."""
    paths = [tmp_path / "one.h5ad", tmp_path / "two.zarr"]
    make_cells(CELLS[0], seed=1).write_h5ad(paths[0])
    second = make_cells(CELLS[1], seed=2)
    second.obs["tissue of it"] = pd.Series("blood", second.obs.index).where(
        second.obs["depth"] < 0.3
    )
    write_zarr(second, paths[1])
    return paths


@pytest.fixture
def every(files: list[Path], small_model: CellPatch, tmp_path: Path) -> anndata.AnnData:
    """The store of all cells."""
    cp.atlas.embed(files, small_model, tmp_path / "all.zarr")
    return anndata.read_zarr(tmp_path / "all.zarr")


def require_rows(store: Path, every: anndata.AnnData, chosen: np.ndarray) -> None:
    part = anndata.read_zarr(store)
    assert 0 < len(chosen) < every.n_obs
    assert np.array_equal(part.obsm[KEY], every.obsm[KEY][chosen])
    expected = every.obs.iloc[chosen]
    pd.testing.assert_frame_equal(part.obs, expected, check_categorical=False)


@pytest.mark.parametrize(
    ("query", "mask"),
    [
        ("kind == 'a'", lambda obs: obs["kind"] == "a"),
        ("depth > 0.25 and kind != 'b'", lambda obs: (obs["depth"] > 0.25) & (obs["kind"] != "b")),
        ("index in ['cell1_7', 'cell2_90']", lambda obs: obs.index.isin(["cell1_7", "cell2_90"])),
        ("index.str.startswith('cell2')", lambda obs: obs.index.str.startswith("cell2")),
    ],
)
def test_query_chooses_as_pandas_does(
    files: list[Path],
    small_model: CellPatch,
    output: Path,
    every: anndata.AnnData,
    query: str,
    mask: Callable[[pd.DataFrame], Any],
) -> None:
    summary = cp.atlas.embed(files, small_model, output, obs_query=query)
    chosen = np.flatnonzero(mask(every.obs))
    assert summary.cells == summary.computed == len(chosen)
    require_rows(output, every, chosen)


def test_missing_values_and_names_with_spaces(
    files: list[Path], small_model: CellPatch, output: Path
) -> None:
    cp.atlas.embed(files[1], small_model, output, obs_query="`tissue of it` == 'blood'")
    part = anndata.read_zarr(output)
    assert 0 < part.n_obs < CELLS[1]
    assert (part.obs["depth"] < 0.3).all()


@pytest.mark.parametrize("as_mask", [False, True])
@pytest.mark.parametrize(
    "chosen", [[0], [sum(CELLS) - 1], [3, 5, 6, 7, 210, 211, 230], range(1, 308, 3)]
)
def test_rows_count_through_all_inputs(
    files: list[Path],
    small_model: CellPatch,
    output: Path,
    every: anndata.AnnData,
    chosen: Any,
    as_mask: bool,
) -> None:
    rows: Any = list(chosen)
    if as_mask:
        rows = np.isin(np.arange(sum(CELLS)), rows)
    cp.atlas.embed(files, small_model, output, rows=rows)
    require_rows(output, every, np.array(chosen))


def test_token_stores_have_rows_too(
    files: list[Path], small_model: CellPatch, output: Path, every: anndata.AnnData, tmp_path: Path
) -> None:
    cp.atlas.tokenize(files, tmp_path / "tokens.zarr", model=small_model)
    cp.atlas.embed(tmp_path / "tokens.zarr", small_model, output, obs_query="kind == 'c'")
    require_rows(output, every, np.flatnonzero(every.obs["kind"] == "c"))


def test_interrupted_work_goes_on_with_the_same_choice_only(
    files: list[Path], small_model: CellPatch, output: Path, tmp_path: Path
) -> None:
    with stopped_after(2):
        cp.atlas.embed(files, small_model, output, obs_query="depth < 0.5")
    for other in ({"obs_query": "depth < 0.6"}, {"rows": np.arange(150)}, {}):
        with pytest.raises(InputError, match=r"other settings(.|\n)*obs_query: was 'depth <"):
            cp.atlas.embed(files, small_model, output, **other)
    done = cp.atlas.embed(files, small_model, output, obs_query="depth < 0.5")
    assert done.computed == done.cells - 40
    at_once = tmp_path / "at-once.zarr"
    cp.atlas.embed(files, small_model, at_once, obs_query="depth < 0.5")
    assert tree(output) == tree(at_once)
    with pytest.raises(InputError, match="rows: was 'not set', is now '2 rows, fingerprint"):
        cp.atlas.embed(files, small_model, output, rows=[1, 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"obs_query": "knd == 'a'"}, r"one.h5ad: .*'knd' is not defined.*obs: kind, depth, barc"),
        ({"obs_query": "`tissue of it` == 'blood'"}, r"one.h5ad: .*'tissue_of_it' is not defined"),
        ({"obs_query": "kind == "}, r"one.h5ad: the query 'kind == ' cannot be answered"),
        ({"obs_query": "kind > 5"}, r"one.h5ad: the query 'kind > 5' cannot be answered"),
        ({"obs_query": "kind == @secret"}, "'secret' is not defined"),
        ({"obs_query": "depth"}, "says of no cell whether it is meant: write a condition"),
        ({"obs_query": "kind = 'a'"}, "says of no cell whether it is meant: write a condition"),
        (
            {"obs_query": "kind == 'x'"},
            r"'x'.* holds for none of the 308 cells of .*one.h5ad, .*tw",
        ),
        ({"obs_query": "depth > 0", "rows": [1]}, "obs_query and rows exclude each other"),
        ({"rows": [3, 308]}, "there is no row 308: the inputs have 308 cells, rows 0 to 307"),
        ({"rows": [-1]}, "there is no row -1"),
        ({"rows": [3, 9, 5]}, "rows must ascend, each once, .*; found 5 after 9"),
        ({"rows": [3, 3]}, "rows must ascend, each once, .*; found 3 after 3"),
        ({"rows": []}, "rows choose no cell"),
        ({"rows": np.zeros(308, bool)}, "rows choose no cell"),
        ({"rows": np.ones(307, bool)}, r"rows are bool \[307\], but the inputs have 308 cells"),
        ({"rows": [0.5]}, r"rows must be positions of cells, .*found float64 \[1\]"),
    ],
)
def test_what_does_not_exist_is_refused_and_nothing_is_made(
    files: list[Path],
    small_model: CellPatch,
    output: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    secret = "a"  # no variable of whoever calls
    with pytest.raises(InputError, match=message):
        cp.atlas.embed(files, small_model, output, **options)
    assert secret
    assert sorted(output.parent.iterdir()) == sorted(files)


def test_command_line(
    files: list[Path],
    model_directory: Path,
    every: anndata.AnnData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("7\n 208\r\n\n300\n")
    command = ["embed", *map(str, files), "--model", str(model_directory), "--output"]
    one, two = tmp_path / "1.zarr", tmp_path / "2.zarr"
    assert cli.main([*command, str(one), "--rows-from", str(rows)]) == 0
    assert "3 of 308 cells are chosen" in capsys.readouterr().err
    require_rows(one, every, np.array([7, 208, 300]))
    assert cli.main([*command, str(two), "--obs-query", "kind == 'b'"]) == 0
    require_rows(two, every, np.flatnonzero(every.obs["kind"] == "b"))
    capsys.readouterr()
    for content, message in (
        ("7\nAACT-1\n", f"{rows}, line 2: expected the position of a cell, counted from 0, found "),
        ("7\n-1\n", "line 2: expected the position of a cell"),
        ("", "rows choose no cell"),
    ):
        rows.write_text(content)
        assert cli.main([*command, str(tmp_path / "3.zarr"), "--rows-from", str(rows)]) == 1
        assert message in capsys.readouterr().err
    missing = ["--rows-from", str(tmp_path / "none.txt")]
    assert cli.main([*command, str(tmp_path / "3.zarr"), *missing]) == 1
    assert "none.txt cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "o.zarr", "--rows-from", str(rows), "--obs-query", "depth > 0"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_all_cells_are_what_is_logged_by_default(
    files: list[Path], small_model: CellPatch, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cellpatch_fast"):
        assert cp.atlas.embed(files, small_model, output).cells == sum(CELLS)
    assert "are chosen" not in caplog.text
