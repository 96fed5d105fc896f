"""The loader delivers exactly the cells it should, the same bits always, and leaves nothing."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellpatch_fast import CellPatch, InputError, RaggedCells, pp
from cellpatch_fast.errors import InputWarning
from cellpatch_fast.loading import CellLoader
from cellpatch_fast.preprocessing.masking import Masking

from ..conftest import GENES, MakeCells
from .batches import CELLS, assert_same, in_file_order, load, loading_threads, open_files, together

FORMATS = ["csr.h5ad", "gzip.h5ad", "csc.h5ad", "dense.h5ad", "v2.zarr", "v3.zarr", "sharded.zarr"]

few = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def expected(tokens: RaggedCells) -> RaggedCells:
    return tokens


@pytest.fixture(scope="module")
def files(adata: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same cells in every format, with chunks that cells cross."""
    folder = tmp_path_factory.mktemp("formats")
    paths = {name: folder / name for name in FORMATS}
    other = adata.copy()
    adata.write_h5ad(paths["csr.h5ad"])
    adata.write_h5ad(paths["gzip.h5ad"], compression="gzip")
    other.X = sparse.csc_matrix(adata.X)
    other.write_h5ad(paths["csc.h5ad"])
    other.X = adata.X.toarray()
    other.write_h5ad(paths["dense.h5ad"])
    for version in (2, 3):
        with anndata.settings.override(zarr_write_format=version):
            adata.write_zarr(paths[f"v{version}.zarr"])
    with anndata.settings.override(zarr_write_format=3):
        adata.write_zarr(paths["sharded.zarr"])
    root = zarr.open_group(paths["sharded.zarr"])
    for part in ("indices", "data"):
        array: Any = root[f"X/{part}"]
        values, attributes = array[:], dict(array.attrs)
        root.create_array(
            f"X/{part}",
            data=values,
            chunks=(53,),
            shards=(53 * 7,),
            overwrite=True,
            attributes=attributes,
        )
    zarr.consolidate_metadata(root.store)
    return paths


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """No thread of the loader and no open file after the test."""
    before = open_files("/formats")
    yield
    gc.collect()
    assert loading_threads() == []
    assert open_files("/formats") <= before


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shuffle", [False, True], ids=["in_order", "shuffled"])
def test_every_format_gives_the_same_cells(
    files: dict[str, Path],
    name: str,
    shuffle: bool,
    small_model: CellPatch,
    expected: RaggedCells,
    nothing_stays: None,
) -> None:
    batches = load(files[name], small_model, batch_size=13, shuffle=shuffle, buffer_size=50)
    assert [len(batch.cells) for batch in batches] == [13] * 16 + [3]
    assert_same(in_file_order(batches), expected)
    if not shuffle:
        assert_same(together(batches), expected)


def test_an_anndata_object_in_memory_is_an_input(
    adata: anndata.AnnData, small_model: CellPatch, expected: RaggedCells
) -> None:
    assert_same(together(load(adata, small_model, batch_size=17)), expected)


@few
@given(
    batch_size=st.integers(1, 300),
    max_entries=st.none() | st.integers(1, 20_000),
    shuffle=st.booleans(),
    block_size=st.integers(1, 70),
    buffer_size=st.integers(1, 300),
    name=st.sampled_from(["csr.h5ad", "sharded.zarr", "dense.h5ad"]),
    threads=st.integers(1, 5),
)
def test_batches_are_the_same_for_any_number_of_threads(
    files: dict[str, Path],
    small_model: CellPatch,
    expected: RaggedCells,
    name: str,
    threads: int,
    **options: Any,
) -> None:
    one = load(files[name], small_model, threads=1, **options)
    many = load(files[name], small_model, threads=threads, memory_limit=30_000_000, **options)
    assert_same(in_file_order(one), expected)
    for batch, other in zip(one, many, strict=True):
        np.testing.assert_array_equal(batch.rows, other.rows)
        assert_same(batch.cells, other.cells)


def test_several_inputs_follow_each_other_whatever_their_genes(
    make_cells: MakeCells, small_model: CellPatch, tmp_path: Path
) -> None:
    whole = [make_cells(cells, seed) for seed, cells in enumerate([31, 1, 67])]
    parts = [whole[0], whole[1][:, ::-1].copy(), whole[2][:, : GENES // 2].copy()]
    expected = RaggedCells.concatenate(
        [pp.tokenize(part, small_model.vocabulary, small_model.config) for part in parts]
    )
    paths = []
    for number, part in enumerate(parts):
        paths.append(tmp_path / f"{number}.h5ad")
        part.write_h5ad(paths[-1])
    ordered = load(paths, small_model, batch_size=29, obs=["kind"])
    assert_same(together(ordered), expected)
    shuffled = load(paths, small_model, batch_size=7, shuffle=True, obs=["kind"])
    assert_same(in_file_order(shuffled), expected)
    kinds = np.concatenate([part.obs["kind"].to_numpy() for part in parts])
    for batches in (ordered, shuffled):
        for batch in batches:
            labels = np.array(["c", "a", "b"], object)[batch.obs["kind"]]
            np.testing.assert_array_equal(labels, kinds[batch.rows])


@pytest.mark.filterwarnings("ignore:the . ranks get")
def test_ranks_share_an_epoch(
    files: dict[str, Path], small_model: CellPatch, expected: RaggedCells
) -> None:
    batches = [
        batch
        for rank in range(3)
        for batch in load(
            files["v3.zarr"], small_model, batch_size=10, shuffle=True, rank=rank, world_size=3
        )
    ]
    assert_same(in_file_order(batches), expected)


def test_unequal_numbers_of_batches_are_told_where_the_loader_was_made(
    files: dict[str, Path], small_model: CellPatch
) -> None:
    """211 cells: a rank of three has 70 or 71."""
    options: dict[str, Any] = {"batch_size": 70, "shuffle": True, "world_size": 3}
    with pytest.warns(InputWarning, match="1 of them 2 per epoch, 2 1") as caught:
        load(files["v3.zarr"], small_model, rank=0, **options)
    assert len(caught) == 1
    assert Path(caught[0].filename).name == "batches.py"  # of the tests
    for fitting in ({"rank": 1}, {"share_batches": True}, {"drop_last": True}):
        load(files["v3.zarr"], small_model, **options, **fitting)  # a warning would be an error


@pytest.mark.parametrize("masking", [None, Masking()], ids=["plain", "masked"])
def test_ranks_share_batches_that_have_fewer_cells_than_there_are_ranks(
    files: dict[str, Path], small_model: CellPatch, expected: RaggedCells, masking: Masking | None
) -> None:
    """Some have no cell then, in whole windows too."""
    options: dict[str, Any] = {"batch_size": 2, "shuffle": True, "buffer_size": 10}
    options |= {"masking": masking, "share_batches": True, "world_size": 5}
    ranks = [load(files["v3.zarr"], small_model, rank=rank, **options) for rank in range(5)]
    assert {len(batches) for batches in ranks} == {-(-CELLS // 2)}
    assert sum(len(batch.rows) for batches in ranks for batch in batches) == CELLS
    if masking is None:
        batches = [batch for batches in ranks for batch in batches]
        assert_same(in_file_order(batches), expected)


def test_chosen_rows_come_alone(
    files: dict[str, Path], small_model: CellPatch, expected: RaggedCells
) -> None:
    rows = np.array([0, 3, 4, 5, 99, 200, 210])
    for choice in (rows, [(0, 1), (3, 6), (99, 100), (200, 201), (210, 211)]):
        batches = load(files["csr.h5ad"], small_model, batch_size=3, rows=choice)
        np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), rows)
        assert_same(together(batches), expected.take(torch.from_numpy(rows)))


def test_each_iteration_is_another_epoch(files: dict[str, Path], small_model: CellPatch) -> None:
    options: dict[str, Any] = {"batch_size": 50, "shuffle": True, "seed": 3}
    with CellLoader(
        files["csr.h5ad"], small_model.vocabulary, small_model.config, **options
    ) as loader:
        first, second = ([batch.rows for batch in loader] for _ in range(2))
        assert len(loader) == len(first) == 5
        loader.epoch = 0
        again = [batch.rows for batch in loader]
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))


def test_balanced_classes_come_equally_often(
    files: dict[str, Path], small_model: CellPatch
) -> None:
    options: dict[str, Any] = {
        "shuffle": True,
        "weights": "kind",
        "obs": ["kind", "depth", "barcode"],
    }
    batches = load(files["csr.h5ad"], small_model, batch_size=32, block_size=8, **options)
    counts = np.bincount(np.concatenate([batch.obs["kind"] for batch in batches]))
    assert counts.sum() == CELLS
    # systematic sampling leaves less than one cell of deviation per block of a class
    assert (np.abs(counts - CELLS / 3) < 10).all()
    assert np.bincount(np.concatenate([batch.rows for batch in batches])).max() > 1
    assert batches[0].obs["depth"].dtype == np.float64


def test_batches_may_be_kept(
    files: dict[str, Path], small_model: CellPatch, expected: RaggedCells
) -> None:
    """The memory of a batch is not used again while somebody holds it."""
    options: dict[str, Any] = {"batch_size": 5, "threads": 2}
    loader = CellLoader(files["csr.h5ad"], small_model.vocabulary, small_model.config, **options)
    with loader:
        kept = []
        for number, batch in enumerate(loader):
            if number % 3 == 0:
                kept.append((batch, batch.cells.values.clone(), batch.cells.genes.numpy().copy()))
    for batch, values, genes in kept:
        assert torch.equal(batch.cells.values, values)
        np.testing.assert_array_equal(batch.cells.genes.numpy(), genes)


def test_masks_depend_on_seed_epoch_and_cell_alone(
    files: dict[str, Path], small_model: CellPatch, expected: RaggedCells
) -> None:
    masking = Masking(max_encoder=60, max_decoder=31)
    one = load(files["csr.h5ad"], small_model, masking=masking, batch_size=CELLS)[0]
    assert one.targets is not None
    for options in ({"batch_size": 9}, {"batch_size": 20, "shuffle": True, "threads": 3}):
        batches = load(files["v3.zarr"], small_model, masking=masking, **options)
        assert_same(in_file_order(batches), one.cells)
        rows = np.concatenate([batch.rows for batch in batches])
        targets = RaggedCells.concatenate([batch.targets for batch in batches if batch.targets])
        assert_same(targets.take(torch.from_numpy(np.argsort(rows))), one.targets)
    np.testing.assert_array_equal(one.entries, expected.lengths.numpy())


@pytest.mark.parametrize("shuffle", [False, True], ids=["in_order", "shuffled"])
def test_consumers_that_stop_anywhere_leave_nothing(
    files: dict[str, Path], small_model: CellPatch, shuffle: bool, nothing_stays: None
) -> None:
    chance = random.Random(7)
    for _ in range(25):
        options: dict[str, Any] = {
            "batch_size": chance.randint(1, 40),
            "threads": chance.randint(1, 4),
        }
        stop = chance.randint(0, CELLS // options["batch_size"])
        with CellLoader(
            files[chance.choice(FORMATS)],
            small_model.vocabulary,
            small_model.config,
            shuffle=shuffle,
            **options,
        ) as loader:
            batches = iter(loader)
            with contextlib.closing(batches), contextlib.suppress(ZeroDivisionError):
                for number, _ in enumerate(batches):
                    if number == stop:
                        if chance.random() < 0.5:
                            raise ZeroDivisionError
                        break
        assert loading_threads() == []


def test_nothing_is_read_far_ahead_of_a_slow_consumer(
    files: dict[str, Path], small_model: CellPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows_made = []
    batches = "cellpatch_fast.loading.windows.Assembly.batches"
    from cellpatch_fast.loading.windows import Assembly

    original = Assembly.batches

    def counted(self: Assembly, plan: object, slots: object) -> object:
        windows_made.append(plan)
        return original(self, plan, slots)  # type: ignore[arg-type]

    monkeypatch.setattr(batches, counted)
    monkeypatch.setattr("cellpatch_fast.loading.loader.WINDOW_BYTES", 1)
    with CellLoader(
        files["csr.h5ad"], small_model.vocabulary, small_model.config, batch_size=5, threads=2
    ) as loader:
        for used, _ in enumerate(loader, 1):
            time.sleep(0.002)
            assert len(windows_made) <= used + 2  # two workers, and one window that waits


def test_an_error_in_a_worker_reaches_the_consumer_and_ends_all(
    adata: anndata.AnnData,
    small_model: CellPatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "cellpatch_fast.loading.inputs.SAMPLE_CELLS", 100
    )  # the error is further on
    monkeypatch.setattr("cellpatch_fast.loading.loader.WINDOW_BYTES", 1)
    bad = adata.copy()
    bad.X.data[bad.X.indptr[150]] = -2
    path = tmp_path / "negative.h5ad"
    bad.write_h5ad(path)
    seen = 0
    with CellLoader(path, small_model.vocabulary, small_model.config, batch_size=25) as loader:
        batches = iter(loader)
        for _ in range(6):
            seen += len(next(batches).cells)
        with pytest.raises(InputError, match=r"cell 150 .*the value is -2"):
            next(batches)
    assert seen == 150
    assert loading_threads() == []


def test_a_memory_limit_holds_or_says_what_is_too_large(
    files: dict[str, Path], small_model: CellPatch, expected: RaggedCells
) -> None:
    options: dict[str, Any] = {"batch_size": 20, "memory_limit": 1_000_000}
    assert_same(together(load(files["sharded.zarr"], small_model, **options)), expected)
    with pytest.raises(InputError, match=r"memory_limit is 0.012 MB.*1 batches of 20 cells"):
        load(files["sharded.zarr"], small_model, **options | {"memory_limit": 12_000})
    with pytest.raises(InputError, match=r"cell \d+ alone may take"):
        load(files["sharded.zarr"], small_model, batch_size=1, memory_limit=6_000)
    with pytest.raises(InputError, match="decoding the file's chunks takes"):
        load(files["csr.h5ad"], small_model, batch_size=1, memory_limit=1_000)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"weights": np.ones(CELLS)}, ValueError, "weights need shuffle=True"),
        ({"weights": np.ones(5), "shuffle": True}, ValueError, "one number per cell"),
        ({"weights": "depth", "shuffle": True}, InputError, "holds numbers"),
        ({"obs": ["colour"]}, InputError, r"no column 'colour' in obs. Its columns: kind"),
        ({"rows": np.array([5, 3])}, ValueError, "rows must be ascending"),
        ({"rows": [(200, 300)]}, ValueError, "not within 0 to 210"),
        ({"layer": "none"}, InputError, "has no layer 'none'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    files: dict[str, Path],
    small_model: CellPatch,
    options: dict[str, object],
    error: type[Exception],
    message: str,
    nothing_stays: None,
) -> None:
    with pytest.raises(error, match=message):
        load(files["csr.h5ad"], small_model, **options)


def test_anndata_needs_to_know_the_model(files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="needs a model's vocabulary and config"):
        CellLoader(files["csr.h5ad"])
