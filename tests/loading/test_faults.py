"""Damage reaches the consumer of the loader as one clear error that names the cells."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cellpatch_fast import CellPatch, InputError, RaggedCells
from cellpatch_fast.io import TokenStore
from cellpatch_fast.io.stores.tokens import FORMAT_VERSION
from cellpatch_fast.loading import CellLoader

from ..io.stores.token_files import append, make_cells, open_writer
from .batches import (
    CHUNK,
    SHARD_CHUNKS,
    Files,
    assert_same,
    load,
    loading_threads,
    open_files,
    together,
)

SHARD = 5  # that is damaged

Damage = Callable[[Path], None]


pytestmark = pytest.mark.usefixtures("watchdog")


@pytest.fixture
def files(originals: Files, tmp_path: Path) -> Files:
    """Copies, to be damaged."""
    copies = {name: tmp_path / name for name in originals}
    for name, path in originals.items():
        copy: Callable[..., Any] = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, copies[name])
    return copies


def assert_nothing_stays(folder: Path) -> None:
    gc.collect()
    assert loading_threads() == []
    assert open_files(str(folder)) == set()


def damaged_part(path: Path) -> tuple[Path, int, int]:
    """The file that is damaged, and where: late in the cells."""
    if path.name == "tokens.zarr":
        part = path / f"genes/c/{SHARD}"
    elif path.name == "cells.zarr":
        part = path / f"X/indices/c/{SHARD}"
    else:
        with h5py.File(path) as file:
            array = file["X/data"]
            chunk = array.id.get_chunk_info(array.id.get_num_chunks() - 1)
        return path, chunk.byte_offset, chunk.byte_offset + chunk.size
    return part, 0, part.stat().st_size


def truncate(path: Path) -> None:
    part, start, stop = damaged_part(path)
    os.truncate(part, (start + stop) // 2)


def overwrite(path: Path) -> None:
    part, start, stop = damaged_part(path)
    with part.open("r+b") as file:
        file.seek(start)
        file.write(b"\xa5" * (stop - start))


def remove(path: Path) -> None:
    damaged_part(path)[0].unlink()


DAMAGE = [
    (name, damage)
    for name in ("tokens.zarr", "cells.zarr", "cells.h5ad")
    for damage in (truncate, overwrite, remove)
    if not (name == "cells.h5ad" and damage is remove)
]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("shuffle", [False, True], ids=["in_order", "shuffled"])
@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_damage_while_iterating_says_which_cells(
    files: Files,
    small_model: CellPatch,
    tmp_path: Path,
    name: str,
    damage: Damage,
    shuffle: bool,
) -> None:
    path = files[name]
    options: dict[str, Any] = {"batch_size": 5, "threads": 2}
    options |= {"shuffle": shuffle, "buffer_size": 5, "block_size": 5, "seed": 1}
    with CellLoader(path, small_model.vocabulary, small_model.config, **options) as loader:
        batches = iter(loader)
        next(batches)
        damage(path)
        with pytest.raises(InputError) as caught:
            for _ in batches:
                pass
        assert loading_threads() == []
    message = str(caught.value)
    assert re.search(r": cannot read cells? \d+( to \d+)?, stored in .* \(", message)
    assert str(path) in message
    assert ("dataset /X/" if name == "cells.h5ad" else f"/c/{SHARD}") in message
    del caught, batches
    assert_nothing_stays(tmp_path)


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_damage_before_iterating(
    files: Files, small_model: CellPatch, tmp_path: Path, name: str, damage: Damage
) -> None:
    damage(files[name])
    with pytest.raises(InputError, match=re.escape(str(files[name]))) as caught:
        load(files[name], small_model, batch_size=5, threads=2)
    del caught
    assert_nothing_stays(tmp_path)


def test_the_cells_of_a_damaged_chunk_are_named(files: Files) -> None:
    """The chunk is the first one of a shard; cells that reach into it are among them."""
    path = files["tokens.zarr"]
    overwrite(path)
    with TokenStore(path) as store:
        chunk = SHARD * SHARD_CHUNKS
        inside = (store.offsets[1:] > chunk * CHUNK) & (store.offsets[:-1] < (chunk + 1) * CHUNK)
        first, last = np.flatnonzero(inside)[[0, -1]]
    place = re.escape(f"genes/c/{SHARD} (inner chunk 0)")
    with pytest.raises(InputError, match=rf"cannot read cells {first} to {last}, .*{place}"):
        load(path)


def test_cells_before_the_damage_are_given(files: Files, tokens: RaggedCells) -> None:
    path = files["tokens.zarr"]
    overwrite(path)
    entries = SHARD * SHARD_CHUNKS * CHUNK  # that are sound
    cells = int(np.searchsorted(tokens.offsets.numpy(), entries, side="right")) - 1
    assert_same(together(load(path, rows=[(0, cells)])), tokens.slice(0, cells))


def test_an_interrupted_store_is_refused(tmp_path: Path) -> None:
    output, cells = tmp_path / "tokens.zarr", make_cells([53, 2, 61])
    with open_writer(output, len(cells)) as writer:
        append(writer, cells, [2])
    for path in (output, tmp_path / "tokens.zarr.partial"):
        with pytest.raises(InputError, match=r"unfinished token store.*repeat that command"):
            CellLoader(path)
    assert_nothing_stays(tmp_path)


def test_another_format_version_is_refused(files: Files, tmp_path: Path) -> None:
    metadata = files["tokens.zarr"] / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"]["cellpatch_tokens"]["format_version"] = FORMAT_VERSION + 1
    metadata.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"format version {FORMAT_VERSION + 1} is not supported"):
        CellLoader(files["tokens.zarr"])
    assert_nothing_stays(tmp_path)
