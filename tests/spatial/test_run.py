"""``spatial_run``: a file of spots becomes a folder of domains, which other runs do not spoil."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from sklearn.metrics import adjusted_rand_score

import cellpatch_fast as cp
from cellpatch_fast import CellPatch
from cellpatch_fast.config import Reading
from cellpatch_fast.errors import InputError
from cellpatch_fast.io.stores.partial import locked
from cellpatch_fast.spatial import run as run_module
from cellpatch_fast.spatial.fitting import Fit
from cellpatch_fast.spatial.run import SpatialRun, read_spots, spatial_run

from ..conftest import write_zarr
from .conftest import SPOTS

pytestmark = pytest.mark.usefixtures("nothing_is_left_to_pyplot")

QUICK: dict[str, Any] = {"epochs": 5, "hidden": 13}

Run = Callable[..., SpatialRun]


@pytest.fixture
def file(tissue: AnnData, tmp_path: Path) -> Path:
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    return tmp_path / "tissue.h5ad"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(file: Path, output: Path) -> Run:
    """``run(model, **options)``: with a small network."""

    def start(model: CellPatch | None = None, **options: Any) -> SpatialRun:
        given: dict[str, Any] = {"data": file, "output": output, "domains": 3} | QUICK | options
        return spatial_run(given.pop("data"), given.pop("output"), model, **given)

    return start


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_writes_tables_and_figures(run: Run, tissue: AnnData, output: Path) -> None:
    done = run(truth="layer")
    assert names(output) == {
        "spatial.h5ad", "domains.csv", "starts.csv", "run",
        "domains.png", "domains.svg", "paga.png", "paga.svg",
    }  # fmt: skip
    spots = anndata.read_h5ad(output / "spatial.h5ad")
    assert list(spots.obs_names) == list(tissue.obs_names)
    assert spots.obsm["X_stagate"].shape == (SPOTS, 30)
    assert "spatial_connectivities" in spots.obsp
    assert np.array_equal(spots.obsm["spatial"], tissue.obsm["spatial"])
    table = pd.read_csv(output / "domains.csv", index_col="spot", dtype={"domain": str})
    assert list(table.index) == list(tissue.obs_names)
    assert (table["domain"] == spots.obs["domain"]).all()
    assert len(pd.read_csv(output / "starts.csv")) == 20
    expected = adjusted_rand_score(tissue.obs["layer"], spots.obs["domain"])
    assert done.score == pytest.approx(expected)
    assert str(done).endswith(f"ARI with the annotation {expected:.3f}")
    assert "110 spots in 3 domains, random starts agree to" in str(done)


def test_a_run_finds_what_the_tools_find(
    run: Run, tissue: AnnData, tissue_model: CellPatch
) -> None:
    spots = run(tissue_model).spots
    cp.tl.spatial_embed(tissue, tissue_model, **QUICK)
    cp.tl.spatial_domains(tissue, n=3)
    assert np.array_equal(spots.obsm["X_stagate"], tissue.obsm["X_stagate"])
    assert (spots.obs["domain"] == tissue.obs["domain"]).all()


def test_zarr_and_layers_are_read(
    run: Run, tissue: AnnData, tissue_model: CellPatch, tmp_path: Path
) -> None:
    expected = run(tissue_model).spots.obsm["X_stagate"]
    tissue.layers["counts"] = tissue.X
    tissue.X = tissue.X * 0
    path = write_zarr(tissue, tmp_path / "tissue.zarr")
    again = run(tissue_model, data=path, output=tmp_path / "zarr", reading=Reading(layer="counts"))
    assert np.array_equal(again.spots.obsm["X_stagate"], expected)


def test_an_interrupted_run_ends_with_the_same_files(
    run: Run, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellpatch_fast.spatial.fitting.CHECKPOINT_SECONDS", -1)
    run(output=tmp_path / "whole")
    step = Fit.step

    def interrupted(self: Fit, pieces: Any) -> float:
        if len(self.losses) == 2:
            raise KeyboardInterrupt
        return step(self, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert names(output) == {"run"}
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_write", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    run()
    for name in ("domains.csv", "starts.csv", "domains.png", "paga.png"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not [name for name in names(output) if name.startswith(".")]


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_other_domains_need_no_other_network(
    run: Run, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(domains=None)
    assert "numbers.csv" in names(output)
    monkeypatch.setattr(Fit, "step", _interrupt)
    assert run(domains=4).spots.obs["domain"].nunique() == 4
    assert "numbers.csv" not in names(output)
    run(method="leiden", domains=None)
    assert "starts.csv" not in names(output)  # of the mixture before
    assert list(pd.read_csv(output / "domains.csv")) == ["spot", "domain"]
    run(domains=1)
    assert not [name for name in names(output) if name.startswith("paga")]


def test_slices_are_kept_apart(run: Run, tissue: AnnData, tmp_path: Path) -> None:
    both = anndata.concat({"a": tissue, "b": tissue}, label="slice", index_unique="-")
    both.write_h5ad(tmp_path / "both.h5ad")
    with pytest.raises(InputError, match="share their position"):
        run(data=tmp_path / "both.h5ad")
    spots = run(data=tmp_path / "both.h5ad", batch_key="slice").spots
    rows = spots.obsm["X_stagate"]
    np.testing.assert_allclose(rows[:SPOTS], rows[SPOTS:], atol=1e-5)
    assert spots.uns["spatial_neighbors"]["params"]["batch_key"] == "slice"


def test_what_a_killed_run_left_of_a_large_tissue_is_cleared_away(
    run: Run, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its folder was made: it is neither in the way, nor does it stay."""
    monkeypatch.setattr("cellpatch_fast.spatial.embedding.WHOLE_SPOTS", SPOTS - 1)
    left = output / ".tissue-abc"
    left.mkdir(parents=True)
    (left / "values").write_bytes(bytes(7))
    run()
    assert not [name for name in names(output) if name.startswith(".")]


def test_two_runs_in_one_folder_are_refused(run: Run, output: Path) -> None:
    run()
    before = (output / "domains.csv").stat().st_mtime_ns
    lock = locked(output)
    try:
        with pytest.raises(InputError, match="another process"):
            run()
    finally:
        os.close(lock)
    assert (output / "domains.csv").stat().st_mtime_ns == before


def test_other_settings_are_refused_and_overwrite_begins_anew(run: Run, output: Path) -> None:
    run()
    with pytest.raises(InputError, match="holds a run with other settings"):
        run(seed=1)
    run(seed=1, overwrite=True)
    settings = json.loads((output / "run" / "training.json").read_text())["settings"]
    assert settings["seed"] == 1


def test_labels_that_are_missing_do_not_count(run: Run, tissue: AnnData, file: Path) -> None:
    layers = tissue.obs["layer"].astype(object)
    layers.iloc[::3] = np.nan
    tissue.obs["partly"] = layers
    tissue.write_h5ad(file)
    done = run(truth="partly")
    known = layers.notna().to_numpy()
    expected = adjusted_rand_score(layers[known], done.spots.obs["domain"][known])
    assert done.score == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truth": "cortex"}, r"obs has no column 'cortex' \(it has layer, array_row"),
        ({"truth": "empty"}, r"obs\['empty'\] names no layer of any spot"),
        ({"truth": "domain"}, r"'domain' is where the domains that are found go"),
        ({"domains": 111}, "1 to 110 domains, one per spot; found n=111"),
        ({"method": "mclust", "domains": None}, "mclust needs a number of domains"),
        ({"method": "kmeans"}, "unknown method 'kmeans'"),
        ({"basis": "X_umap"}, "obsm has no 'X_umap'"),
        ({"batch_key": "slice"}, "obs has no column 'slice'"),
        ({"preset": "paper"}, "but there is no model"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"radius": 99.0}, "no two spots are within a radius of 99"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(
    run: Run, tissue: AnnData, file: Path, output: Path, options: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tissue.obs["empty"], tissue.obs["domain"] = np.nan, tissue.obs["layer"]
    tissue.write_h5ad(file)
    monkeypatch.setattr("cellpatch_fast.spatial.embedding.read_expression", _interrupt)
    with pytest.raises(InputError, match=message):
        run(**options)
    assert not output.exists()


def test_files_that_are_no_spots_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.h5ad does not exist"):
        read_spots(tmp_path / "nowhere.h5ad")
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(InputError, match="cannot be read as AnnData"):
        run(data=tmp_path / "text.h5ad")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(InputError, match=r"cannot be read as AnnData|has no obs"):
        run(data=tmp_path / "empty.zarr")


def test_folders_of_others_are_left_alone(run: Run, output: Path, tmp_path: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other things than a spatial run"):
        run()
    assert names(output) == {"thesis.txt"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file: choose a folder"):
        run(output=tmp_path / "file")
