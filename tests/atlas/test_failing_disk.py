"""Embedding and tokenising on a disk that fails: at every single change of a file, in turn.

After each failure the same call goes on and ends with the bits of an uninterrupted run and nothing
beside them; whatever has the output's name is complete throughout. By default the disk fails once
at each kind of change, several in a row, and at some more, for good or in passing; at all and in
both ways with CELLPATCH_TESTS=thorough.
"""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pytest

from cellpatch_fast import CellPatch, InputError, atlas
from cellpatch_fast.atlas.making import KEY
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
IN_A_ROW = 9  # failures, before a run comes to its end and is compared
ALONE = 5  # random ones, each in a run of its own

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


def alike(call: Call) -> str:
    """Metadata, annotation and what is deleted differ in their names only, not in what is done."""
    parts = Path(call.path).parts
    if len(parts) < 3 or parts[2] in ("genes", "values") or parts[2:4] == ("obsm", KEY):
        return call.what
    name = parts[-1].lstrip(".").split(".")[0] if "." in parts[-1] else "folder or chunk"
    return f"{call.kind} {parts[1]}: {name if name == 'zarr' else 'other'}"


def fail_everywhere(
    make: Make, before: Callable[[Path], object], calls: list[Call], folder: Path, **options: Any
) -> None:
    """Have each of the calls fail, and require that the run then goes on to the same bytes."""
    make(folder / "whole" / "out.zarr")
    expected = tree(folder / "whole")
    in_turn = chosen(calls, alike=alike, more=0)
    size = 1 if THOROUGH else IN_A_ROW
    rows: list[list[int | str]] = [
        [call.number if THOROUGH else call.what for call in in_turn[start : start + size]]
        for start in range(0, len(in_turn), size)
    ]
    if not THOROUGH:
        rows += [[call.number] for call in random.Random(0).sample(calls, ALONE)]
    for number, row in enumerate(rows):
        for for_good in (False, True) if THOROUGH else (bool(number % 2),):
            place = folder / f"{number} {for_good}"
            place.mkdir()
            output = place / "out.zarr"
            before(output)
            for fails_at in row:
                with (
                    FailingFiles(place, fails_at=fails_at, for_good=for_good) as files,
                    contextlib.suppress(OSError, InputError),
                ):
                    make(output, **options)
                assert files.failed is not None, (fails_at, row)
                assert not output.exists() or is_complete(output), (fails_at, row)
            with FailingFiles(place):  # where nothing has to reach the disk
                make(output, **options)
            assert not partial_of(output).exists(), row
            remade = tree(place)
            assert [*remade] == [*expected], row
            assert remade == expected, row
            shutil.rmtree(place)


def counted(make: Make, output: Path, **options: Any) -> list[Call]:
    with FailingFiles(output.parent) as files:
        make(output, **options)
    return files.calls


def test_run_goes_on_after_any_failure(make: Make, tmp_path: Path) -> None:
    (tmp_path / "counted").mkdir()
    calls = counted(make, tmp_path / "counted" / "out.zarr")
    assert {call.kind for call in calls} >= {"open", "write", "fsync", "replace", "rename", "rmdir"}
    fail_everywhere(make, before=lambda output: None, calls=calls, folder=tmp_path)


def test_overwriting_goes_on_after_any_failure(make: Make, tmp_path: Path) -> None:
    """What has the output's name is complete throughout: the old store or the new one."""
    old = tmp_path / "counted" / "out.zarr"
    make(old)
    shutil.copytree(old, tmp_path / "old.zarr")
    calls = counted(make, old, overwrite=True)
    if not THOROUGH:  # until the old store is moved, all is as without one
        first = next(call.number for call in calls if Path(call.path).name == REPLACED)
        calls = [call for call in calls if call.number >= first]
        assert any(DISCARDED in Path(call.path).parts for call in calls)

    def put_old(output: Path) -> None:
        shutil.copytree(tmp_path / "old.zarr", output)

    fail_everywhere(make, before=put_old, calls=calls, folder=tmp_path, overwrite=True)
