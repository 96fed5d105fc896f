"""A disk that fails at any write, fsync or renaming: the run says so and, repeated, ends the same.

Each call fails twice: once as on a disk that recovers, and once for good, as after a kill.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pytest

from cellpatch_fast import CellPatch, InputError, atlas
from cellpatch_fast.io.stores import embeddings
from cellpatch_fast.io.stores.embeddings import ATTRIBUTE
from cellpatch_fast.io.stores.partial import DISCARDED, REPLACED, finished_facts, partial_of
from cellpatch_fast.io.stores.tokens import ATTRIBUTE as TOKENS

from ..conftest import MakeCells, tree
from ..failing_files import THOROUGH, Call, FailingFiles, chosen

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="finds files by /proc"),
    pytest.mark.usefixtures("_small_pieces"),
]

CELLS = 83

Make = Callable[..., object]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shards of embeddings."""
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 31)
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 1)


@pytest.fixture
def inputs(make_cells: MakeCells, tmp_path: Path) -> Path:
    """One column of obs: each has files of its own, that would all fail alike."""
    cells = make_cells(CELLS)
    path = tmp_path / "cells.h5ad"
    anndata.AnnData(cells.X, obs=cells.obs[["kind"]], var=cells.var).write_h5ad(path)
    return path


@pytest.fixture(params=["embed", "tokenize", "shuffle"])
def make(request: pytest.FixtureRequest, inputs: Path, small_model: CellPatch) -> Make:
    """``make(output, overwrite=False)``: the store."""
    if request.param == "embed":
        return functools.partial(atlas.embed, inputs, small_model, progress=False)
    options: dict[str, Any] = {"model": small_model, "shuffle": request.param == "shuffle"}
    return lambda output, **others: atlas.tokenize(inputs, output, **options, **others)


def is_complete(output: Path) -> bool:
    return any(finished_facts(output, attribute) for attribute in (ATTRIBUTE, TOKENS))


def fail_everywhere(
    make: Make, before: Callable[[Path], None], calls: list[Call], folder: Path, **options: Any
) -> None:
    """Have each of the calls fail, and require that the run then goes on to the same bytes."""
    make(folder / "whole" / "out.zarr")
    expected = tree(folder / "whole")
    for call in calls:
        for for_good in (False, True) if THOROUGH else (bool(call.number % 2),):
            place = folder / f"{call.number} {for_good}"
            place.mkdir()
            output = place / "out.zarr"
            before(output)
            with (
                FailingFiles(place, fails_at=call.number, for_good=for_good) as files,
                contextlib.suppress(OSError, InputError),
            ):
                make(output, **options)
            assert files.failed is not None, call
            assert not output.exists() or is_complete(output), (call, for_good)
            make(output, **options)
            found = tree(place)
            assert [*found] == [*expected], (call, for_good)
            assert found == expected, (call, for_good)
            assert not partial_of(output).exists(), (call, for_good)
            shutil.rmtree(place)


def counted(make: Make, output: Path, **options: Any) -> list[Call]:
    with FailingFiles(output.parent) as files:
        make(output, **options)
    return files.calls


def test_run_goes_on_after_any_failure(make: Make, tmp_path: Path) -> None:
    (tmp_path / "counted").mkdir()
    calls = counted(make, tmp_path / "counted" / "out.zarr")
    assert {call.kind for call in calls} >= {"open", "write", "fsync", "replace", "rename", "rmdir"}
    fail_everywhere(make, lambda output: None, chosen(calls), tmp_path)


def test_overwriting_goes_on_after_any_failure(make: Make, tmp_path: Path) -> None:
    """What has the output's name is complete throughout: the old store or the new one."""
    old = tmp_path / "counted" / "out.zarr"
    old.parent.mkdir()
    make(old)
    shutil.copytree(old, tmp_path / "old.zarr")
    calls = counted(make, old, overwrite=True)
    if not THOROUGH:  # until the old store is moved, all is as without one
        first = next(call.number for call in calls if Path(call.path).name == REPLACED)
        calls = [call for call in calls if call.number >= first]
        assert any(DISCARDED in Path(call.path).parts for call in calls)
    fail_everywhere(
        *(make, lambda output: shutil.copytree(tmp_path / "old.zarr", output)),
        *(chosen(calls), tmp_path),
        overwrite=True,
    )
