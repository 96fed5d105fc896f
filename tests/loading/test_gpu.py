"""On a GPU the loader's batches are those on a CPU, and its page-locked memory comes back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from torch import Tensor

from cellpatch_fast import CellPatch, RaggedCells, pp
from cellpatch_fast.loading import CellBatch, CellLoader
from cellpatch_fast.loading.slots import Slot, Slots
from cellpatch_fast.preprocessing.masking import Masking

from ..conftest import MakeCells
from ..io.stores.token_files import write_store
from .batches import (
    assert_same,
    assert_same_batches,
    in_file_order,
    load,
    loading_threads,
    open_files,
)

pytestmark = pytest.mark.gpu

CELLS = 503
KINDS: dict[str, dict[str, Any]] = {
    "in_order": {},
    "shuffled": {"shuffle": True, "buffer_size": 60, "block_size": 7},
    "masked": {"masking": Masking(max_encoder=50, max_decoder=31)},
}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_file = pytest.mark.parametrize("name", ["tokens.zarr", "cells.h5ad"])


@pytest.fixture(scope="module")
def adata(make_cells: MakeCells) -> anndata.AnnData:
    return make_cells(CELLS)


@pytest.fixture(scope="module")
def tokens(adata: anndata.AnnData, small_model: CellPatch) -> RaggedCells:
    return pp.tokenize(adata, small_model.vocabulary, small_model.config)


@pytest.fixture(scope="module")
def files(
    adata: anndata.AnnData,
    tokens: RaggedCells,
    small_model: CellPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpu-loader")
    files = {name: folder / name for name in ("tokens.zarr", "cells.h5ad")}
    write_store(
        files["tokens.zarr"],
        tokens,
        vocabulary=small_model.vocabulary,
        chunk_entries=211,
        shard_chunks=13,
    )
    adata.write_h5ad(files["cells.h5ad"], compression="gzip")
    return files


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many windows, so that memory is reused."""
    monkeypatch.setattr("cellpatch_fast.loading.loader.WINDOW_BYTES", 1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Slots, bool]]:
    """Where each slot came from, and whether it is page-locked."""
    slots: list[tuple[Slots, bool]] = []
    take = Slots.take

    def note(self: Slots, size: int) -> Slot:
        slot = take(self, size)
        slots.append((self, slot._whole.is_pinned()))
        return slot

    monkeypatch.setattr(Slots, "take", note)
    return slots


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each page-locked allocation."""
    sizes: list[int] = []
    empty = torch.empty

    def note(*size: Any, **options: Any) -> Tensor:
        if options.get("pin_memory"):
            sizes.append(size[0])
        return empty(*size, **options)

    monkeypatch.setattr("cellpatch_fast.loading.slots.torch.empty", note)
    return sizes


def on_cpu(batch: CellBatch) -> CellBatch:
    targets = None if batch.targets is None else batch.targets.to("cpu")
    return CellBatch(
        cells=batch.cells.to("cpu"),
        rows=batch.rows,
        entries=batch.entries,
        unknown_entries=batch.unknown_entries,
        obs=batch.obs,
        targets=targets,
        mask_counts=batch.mask_counts,
    )


@each_kind
@each_file
def test_batches_are_those_of_the_cpu(
    files: dict[str, Path], small_model: CellPatch, name: str, kind: str
) -> None:
    """Also when all of them are kept: no memory is overwritten that can still be seen."""
    options: dict[str, Any] = {"batch_size": 7, "threads": 3} | KINDS[kind]
    kept = load(files[name], small_model, device="cuda", **options)
    for batch in kept:
        for cells in (batch.cells, batch.targets):
            for tensor in (cells.offsets, cells.genes, cells.values) if cells else ():
                assert tensor.device.type == "cuda"
    assert_same_batches(
        [on_cpu(batch) for batch in kept], load(files[name], small_model, **options)
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_slots_are_page_locked_for_a_gpu_only(
    files: dict[str, Path], taken: list[tuple[Slots, bool]], device: str
) -> None:
    load(files["tokens.zarr"], device=device, batch_size=50)
    assert {pinned for _, pinned in taken} == {device == "cuda"}


@each_kind
def test_page_locked_memory_comes_back(
    files: dict[str, Path], allocations: list[int], small_model: CellPatch, kind: str
) -> None:
    """Batches that are kept hold none of it; windows reuse what those before them had."""
    options: dict[str, Any] = {"batch_size": 3, "threads": 2} | KINDS[kind]
    kept = load(files["tokens.zarr"], small_model, device="cuda", **options)
    assert len(kept) == -(-CELLS // 3)
    # A window that is larger than all before it takes new memory; the others do not.
    assert len(allocations) < 20
    assert_same(
        in_file_order([on_cpu(batch) for batch in kept]),
        in_file_order(load(files["tokens.zarr"], small_model, **options)),
    )


@pytest.mark.parametrize("own_stream", [False, True], ids=["default_stream", "own_stream"])
def test_a_consumer_on_its_own_stream_sees_whole_batches(
    files: dict[str, Path], tokens: RaggedCells, own_stream: bool
) -> None:
    """Its kernels come late, and it lets go of a batch before they have run.

    Neither do they read what is not copied yet, nor is the memory given to the next batch.
    """
    stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
    sums, rows = [], []
    with (
        CellLoader(files["tokens.zarr"], batch_size=5, threads=3, device="cuda") as loader,
        torch.cuda.stream(stream),
    ):
        for batch in loader:
            torch.cuda._sleep(1_000_000)  # about half a millisecond
            values = batch.cells.values.double()
            genes = batch.cells.genes.to(torch.int32).double()
            sums.append(torch.stack([values.sum(), (values * genes).sum()]))
            rows.append(batch.rows)
            del batch, values, genes
        totals = torch.stack(sums).cpu()
    expected = []
    for part in rows:
        cells = tokens.take(torch.from_numpy(part))
        values = cells.values.double()
        genes = torch.from_numpy(cells.genes.numpy().astype(np.float64))
        expected.append(torch.stack([values.sum(), (values * genes).sum()]))
    assert torch.equal(totals, torch.stack(expected))  # whole numbers: exact in any order


@each_kind
def test_stopping_early_leaves_nothing(
    files: dict[str, Path], small_model: CellPatch, taken: list[tuple[Slots, bool]], kind: str
) -> None:
    options: dict[str, Any] = {"batch_size": 3, "threads": 3, "device": "cuda"} | KINDS[kind]
    for stop in (1, 2, 17):
        torch.cuda.synchronize()
        gc.collect()
        before = torch.cuda.memory_allocated()
        with CellLoader(
            files["tokens.zarr"], small_model.vocabulary, small_model.config, **options
        ) as loader:
            batches = iter(loader)
            for _ in range(stop):
                next(batches)
            batches.close()
            assert loading_threads() == []
        del batches, loader
        gc.collect()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert {slots.free_bytes for slots, _ in taken} == {0}
    assert open_files("/gpu-loader") == set()


def test_features_are_those_of_batches_moved_by_hand(
    files: dict[str, Path], small_model: CellPatch, tokens: RaggedCells
) -> None:
    """Loading and computing overlap, and the model sees the same."""
    model = CellPatch(small_model.config, small_model.vocabulary).eval().cuda()
    with torch.inference_mode():
        options: dict[str, Any] = {"batch_size": 61, "threads": 3, "device": "cuda"}
        with CellLoader(files["tokens.zarr"], model.vocabulary, **options) as loader:
            features = torch.cat([model.encode(batch.cells) for batch in loader])
        parts = [
            tokens.slice(first, min(first + 61, CELLS)).to("cuda") for first in range(0, CELLS, 61)
        ]
        expected = torch.cat([model.encode(part) for part in parts])
    assert (features - expected).norm() <= 1e-5 * expected.norm()
