"""Generated atlases: as real as they claim, the same however they are made, whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import kstest, nbinom

from cellpatch_fast import InputError, cli
from cellpatch_fast.genes.names import human_genes
from cellpatch_fast.synthetic import frequencies, generate, writer
from cellpatch_fast.synthetic.generate import SyntheticAtlas, synthetic_atlas
from cellpatch_fast.synthetic.settings import AtlasSettings

CELLS, TYPES, BATCHES = 1_511, 7, 3
SMALL: dict[str, Any] = {"genes": 61, "cell_types": 3, "batches": 2, "progress": False}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> anndata.AnnData:
    path = tmp_path_factory.mktemp("atlas") / "atlas.h5ad"
    synthetic_atlas(path, CELLS, cell_types=TYPES, batches=BATCHES, progress=False)
    return anndata.read_h5ad(path)


def read(path: Path) -> anndata.AnnData:
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


def assert_same(one: anndata.AnnData, other: anndata.AnnData) -> None:
    assert sp.csr_matrix(one.X != other.X).nnz == 0
    pd.testing.assert_frame_equal(one.obs, other.obs)
    pd.testing.assert_frame_equal(one.var, other.var)


# What is in it


def test_is_counts_of_human_genes_in_canonical_form(atlas: anndata.AnnData) -> None:
    matrix = atlas.X
    assert matrix.shape == (CELLS, len(human_genes().ensembl_ids))
    assert matrix.has_canonical_format
    assert matrix.dtype == np.float32
    assert matrix.indptr.dtype == matrix.indices.dtype == np.int32
    assert (matrix.data >= 1).all()
    assert (matrix.data == matrix.data.round()).all()
    assert atlas.var_names.tolist() == list(human_genes().ensembl_ids)
    assert atlas.var.loc["ENSG00000167286", "feature_name"] == "CD3D"
    assert atlas.obs_names.is_unique


def test_can_be_tokenized_without_loss(tmp_path: Path) -> None:
    from cellpatch_fast import GeneVocabulary, pp

    made = synthetic_atlas(tmp_path / "small.zarr", 17, **SMALL)
    cells = pp.tokenize(str(made.path), GeneVocabulary.human())
    assert (len(cells), cells.entries) == (17, made.entries)


def test_genes_per_cell_are_log_normal(atlas: anndata.AnnData) -> None:
    logs = np.log(np.diff(atlas.X.indptr))
    assert np.exp(np.median(logs)) == pytest.approx(AtlasSettings.genes, rel=0.04)
    assert logs.std() == pytest.approx(AtlasSettings.spread, rel=0.06)
    assert kstest((logs - logs.mean()) / logs.std(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("genes", [43, 5_003])
def test_the_median_and_spread_of_genes_are_those_asked_for(genes: int) -> None:
    law = generate._law(
        AtlasSettings(genes=genes, spread=0.07, cell_types=2, markers=3, batches=2, donors=2)
    )
    lengths = np.concatenate([np.diff(part.offsets) for part in generate._drawn(law, 501, 0)])
    assert np.median(lengths) == pytest.approx(genes, rel=0.05)
    sampling = 1 / np.sqrt(genes)  # at most, of detecting genes by chance
    assert 0.06 < np.log(lengths).std() < 0.08 + sampling


def test_genes_are_as_common_as_the_formula_says() -> None:
    """Without types and batches that differ, at one depth."""
    cells, depth = 4_001, 1.7
    law = generate._law(
        AtlasSettings(
            genes=1_009, spread=0.0, cell_types=1, markers=0, marker_fold=1.0, batches=1, donors=1
        )
    )
    law = law._replace(
        efficiencies=np.ones_like(law.efficiencies),
        log_depths=np.full_like(law.log_depths, np.log(depth)),
    )
    parts = list(generate._drawn(law, cells, 5))
    columns, counts = (
        np.concatenate([getattr(p, x) for p in parts]) for x in ("columns", "counts")
    )
    places = np.argsort(law.columns)[columns]  # ranks
    means = depth * frequencies.mean_counts(len(law.columns))
    expected = cells * frequencies.detection(means)
    found = np.bincount(places, minlength=len(means))
    # of stretches of ranks, each a sum of independent chances
    for first, last in [(0, 1), (1, 19), (19, 307), (307, 2_003), (2_003, 9_001), (9_001, 60_664)]:
        ranks = slice(first, last)
        deviation = np.sqrt((expected[ranks] * (1 - expected[ranks] / cells)).sum()) + 1e-9
        assert abs(found[ranks].sum() - expected[ranks].sum()) < 4.5 * deviation + 1
    for rank in (0, 3, 131, 997):  # by geometric numbers, and up the distribution
        mine = counts[places == rank]
        count = nbinom(2, 1 / (1 + means[rank] / 2))
        for most in (1, 2, 5, 40):
            share = (count.cdf(most) - count.pmf(0)) / count.sf(0)
            error = np.sqrt(max(share * (1 - share), 0) / len(mine))
            assert abs((mine <= most).mean() - share) < 4.5 * error + 1e-6


def test_frequencies_are_those_measured_in_pbmc_3k() -> None:
    """The share of its 2,638 cells that express the gene of a rank, smoothed over ranks."""
    measured = {22: 0.994, 51: 0.984, 94: 0.927, 216: 0.578, 494: 0.325, 1_128: 0.174}
    measured |= {2_580: 0.0804, 5_898: 0.0265, 8_917: 0.00986}
    means = frequencies.mean_counts(20_000)
    lengths = AtlasSettings.genes * np.exp(0.31 * np.linspace(-2, 2, 41))
    depths = frequencies.depths(lengths, len(means))
    weights = np.exp(-0.5 * np.linspace(-2, 2, 41) ** 2)
    for rank, share in measured.items():
        chance = np.average(frequencies.detection(depths * means[rank - 1]), weights=weights)
        assert chance == pytest.approx(share, rel=0.15, abs=1e-3)


def test_a_simple_classifier_finds_the_types(atlas: anndata.AnnData) -> None:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline

    scale = 1e4 / np.asarray(atlas.X.sum(1)).ravel()
    logs = sp.csr_matrix(sp.diags(scale) @ atlas.X).log1p()
    types, training = atlas.obs["cell_type"].to_numpy(), np.arange(CELLS) % 3 > 0
    model = make_pipeline(TruncatedSVD(20, random_state=0), LinearDiscriminantAnalysis())
    model.fit(logs[training], types[training])
    assert model.score(logs[~training], types[~training]) > 0.9
    assert 1 / TYPES < (types == "type 1").mean() < 0.5  # what guessing the largest would give


def test_markers_are_named_and_more_common_in_their_type(atlas: anndata.AnnData) -> None:
    markers = atlas.var["marker_of"]
    assert (markers.value_counts() == 40).all()
    for kind in atlas.obs["cell_type"].cat.categories:
        own = atlas.X[:, (markers == kind).to_numpy()]
        inside = (atlas.obs["cell_type"] == kind).to_numpy()
        ratio = own[inside].mean() / own[~inside].mean()
        assert 6 < ratio < 10


def test_a_donor_is_in_one_batch_and_batches_differ(atlas: anndata.AnnData) -> None:
    pairs = atlas.obs[["donor", "batch"]].drop_duplicates()
    assert len(pairs) == 2 * BATCHES
    assert set(pairs["batch"]) == {"batch 1", "batch 2", "batch 3"}
    means = np.array(
        [
            np.asarray(atlas.X[(atlas.obs["batch"] == batch).to_numpy()].mean(0)).ravel()
            for batch in atlas.obs["batch"].cat.categories
        ]
    )
    common = means[:, means.mean(0) > 5]
    assert 0.1 < np.log(common / common.mean(0)).std() < 0.4


# The same, however it is made


def test_formats_compressions_blocks_threads_and_chunks_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic_atlas(tmp_path / "a.h5ad", 307, **SMALL)
    expected = read(tmp_path / "a.h5ad")
    monkeypatch.setattr(generate, "BLOCK_ENTRIES", 5_000)
    monkeypatch.setattr(generate, "MOST_THREADS", 3)
    monkeypatch.setattr(generate, "usable_cores", lambda: 3)
    monkeypatch.setattr(writer, "CHUNK", 997)
    monkeypatch.setattr(writer, "SHARD_CHUNKS", 3)
    for name, compression in [("b.h5ad", "gzip"), ("c.zarr", None), ("d.zarr", "zstd")]:
        synthetic_atlas(tmp_path / name, 307, compression=compression, **SMALL)
        assert_same(read(tmp_path / name), expected)


def test_a_small_atlas_is_the_start_of_a_large_one_and_seeds_differ_in_cells_only(
    tmp_path: Path,
) -> None:
    large, small, other = (
        read(synthetic_atlas(tmp_path / f"{i}.h5ad", cells, seed=seed, **SMALL).path)
        for i, (cells, seed) in enumerate([(211, 3), (101, 3), (211, 4)])
    )
    assert_same(large[:101].copy(), small)
    pd.testing.assert_frame_equal(large.var, other.var)
    assert sp.csr_matrix(large.X != other.X).nnz > 0


def test_much_longer_cells_than_expected_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's room is for the cells that are expected; the rest is drawn in further parts."""
    synthetic_atlas(tmp_path / "a.h5ad", 31, genes=3_001, spread=1.5, progress=False)
    monkeypatch.setattr(generate, "BLOCK_ENTRIES", 1)
    synthetic_atlas(tmp_path / "b.h5ad", 31, genes=3_001, spread=1.5, progress=False)
    law = generate._law(AtlasSettings(genes=3_001, spread=1.5))
    assert len(generate._draw(law, np.uint64(0), 0, 31)) > 1
    assert_same(read(tmp_path / "a.h5ad"), read(tmp_path / "b.h5ad"))


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
def test_offsets_have_64_bits_where_entries_may_need_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Columns too: SciPy fails on matrices that have both."""
    monkeypatch.setattr(generate, "MOST_ENTRIES", 1_000)
    many = read(synthetic_atlas(tmp_path / name, 29, **SMALL).path).X
    assert many.indptr.dtype == many.indices.dtype == np.int64
    assert np.diff(many.indptr).min() > 0
    assert many.indptr[-1] == len(many.indices) == len(many.data)


# Whole, or not at all


class Stop(BaseException):
    """As Ctrl-C raises, at a moment that the test chooses."""


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
def test_nothing_is_left_of_an_interrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(generate, "BLOCK_ENTRIES", 1_000)
    seen = []
    append = writer.AnnDataWriter.append

    def stop_at_the_third(self: writer.AnnDataWriter, *arguments: Any) -> None:
        seen.append([path.name for path in tmp_path.iterdir()])
        if len(seen) == 3:
            raise Stop
        append(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(writer.AnnDataWriter, "append", stop_at_the_third)
        with pytest.raises(Stop):
            synthetic_atlas(tmp_path / name, 101, **SMALL)
    assert len(seen[-1]) == 1
    assert seen[-1] != [name]
    assert not list(tmp_path.iterdir())
    synthetic_atlas(tmp_path / name, 101, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cells": 0}, "cells must be a whole number from 1"),
        ({"cells": 2.5}, "found 2.5"),
        ({"cells": True}, "found True"),
        ({"genes": 20_001}, "genes must be a whole number from 1 to 20,000, found 20001"),
        ({"spread": float("nan")}, "spread must be a number from 0 to 2, found nan"),
        ({"cell_types": 0}, "cell_types"),
        ({"cell_types": 200, "markers": 30}, "markers must be a whole number from 0 to 29"),
        ({"marker_fold": 0.5}, "marker_fold"),
        ({"batches": 5, "donors": 4}, "donors must be a whole number from 5"),
        ({"seed": -1}, "seed"),
        ({"compression": "zstd"}, "choose gzip or lzf, or None"),
        ({"path": "atlas.loom"}, "must end in .h5ad or .zarr"),
        ({"path": "missing/atlas.h5ad"}, "there is no folder"),
        ({"path": "taken.h5ad"}, "taken.h5ad exists: choose another name"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    (tmp_path / "taken.h5ad").write_text("mine")
    arguments = {"path": "atlas.h5ad", "cells": 11, **arguments}
    with pytest.raises(InputError, match=message):
        synthetic_atlas(tmp_path / arguments.pop("path"), arguments.pop("cells"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.h5ad"]
    assert (tmp_path / "taken.h5ad").read_text() == "mine"


# The summary, and the command


def test_the_summary_says_what_was_written(tmp_path: Path) -> None:
    made = synthetic_atlas(tmp_path / "a.h5ad", 23, **SMALL)
    assert made.entries == read(made.path).X.nnz
    shown = str(SyntheticAtlas(Path("x.h5ad"), 1_000, 60_664, 820_000, 3, 2, 0.5))
    assert shown == (
        "x.h5ad: 1,000 cells of 3 types in 2 batches, 820 of 60,664 genes per cell, 2,000 cells/s"
    )


def test_the_command_writes_what_the_function_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cells=19", "--genes=61", "--cell-types=3", "--batches=2", "--compression=lzf"]
    assert cli.main(["synthetic-atlas", str(tmp_path / "a.h5ad"), *options]) == 0
    assert "19 cells of 3 types" in capsys.readouterr().out
    synthetic_atlas(tmp_path / "b.h5ad", 19, **SMALL)
    assert_same(read(tmp_path / "a.h5ad"), read(tmp_path / "b.h5ad"))
    assert cli.main(["synthetic-atlas", str(tmp_path / "a.h5ad"), *options]) == 1
    assert "exists" in capsys.readouterr().err
