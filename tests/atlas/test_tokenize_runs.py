"""`atlas.tokenize` goes on with and replaces only what it may, and says why it does not."""

from __future__ import annotations

import dataclasses
import functools
import random
import shutil
import threading
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import anndata
import pytest
import scanpy as sc

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, InputError
from cellpatch_fast.io.stores.buckets import Buckets
from cellpatch_fast.io.stores.partial import partial_of
from cellpatch_fast.io.stores.shards import ShardFile
from cellpatch_fast.io.stores.token_writer import TokenWriter

from ..conftest import Tokenize, tree

pytestmark = pytest.mark.usefixtures("_small_pieces")

CELLS = 211
CONTINUOUS = CellPatchConfig(value_rounding="none", value_clip=None)


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
        pytest.param(False, ShardFile, "finish", 90, id="in order, while a shard is kept"),
        pytest.param(True, Buckets, "append", 22, id="shuffled, while reading"),
        pytest.param(True, Buckets, "_checkpoint", 8, id="shuffled, at a checkpoint"),
        pytest.param(True, TokenWriter, "append", 6, id="shuffled, while writing"),
        pytest.param(True, ShardFile, "finish", 90, id="shuffled, while a shard is kept"),
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
    assert summary.computed <= CELLS


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
    assert summary.computed == 0 if shuffle else 0 < summary.computed < CELLS // 2
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


def test_repeating_a_finished_run_does_nothing(
    cells_file: Path, small_vocabulary: GeneVocabulary, output: Path
) -> None:
    first = cp.atlas.tokenize(cells_file, output, vocabulary=small_vocabulary)
    times = {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]}
    second = cp.atlas.tokenize(cells_file, output, vocabulary=small_vocabulary)
    assert {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]} == times
    assert str(second) == f"{output} is complete already: 211 cells, nothing to do"
    assert second == dataclasses.replace(first, computed=0, seconds=0.0)


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
        ({"model": small_model}, "give no vocabulary beside it"),
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


@pytest.mark.filterwarnings("ignore:.*the logarithms are of raw counts")
def test_value_beyond_half_precision_is_refused(
    tokenize: Tokenize, cells_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in a file whose first cells look like logarithms there can be so large ones."""
    monkeypatch.setattr("cellpatch_fast.loading.inputs.SAMPLE_CELLS", 100)
    adata = anndata.read_h5ad(cells_file)
    with warnings.catch_warnings(action="ignore"):  # there is an empty cell
        sc.pp.normalize_total(adata, target_sum=1e4)
    adata.X = adata.X.log1p()
    adata.X.data[-5] = 1e5  # of a known gene, in the last cell
    adata.write_h5ad(cells_file)
    for shuffle in (False, True):
        with pytest.raises(InputError, match=r"cell 210 .* the value 100000, .* float16"):
            tokenize(cells_file, config=CONTINUOUS, input="lognorm", shuffle=shuffle)
        assert not output.exists()
        shutil.rmtree(partial_of(output))
