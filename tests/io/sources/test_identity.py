"""What the fingerprint of an input follows: what is in it, not when or how it was written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from cellpatch_fast.io.sources import identity
from cellpatch_fast.io.sources.source import open_source

from ..conftest import CONTAINERS, make_adata, write

Change = Callable[[Any], None]
FOLDERS = [container for container in CONTAINERS if container != "zarr-zip"]  # can be changed


def fingerprint(path: Path, **place: Any) -> str:
    with open_source(path, **place) as source:
        return source.fingerprint()


def change(path: Path, change: Change) -> None:
    """Change a store in place, with its times kept."""
    files = [path, *path.rglob("*")]
    times = {file: file.stat() for file in files}
    if path.is_dir():
        change(zarr.open_group(path, mode="r+"))
    else:
        with h5py.File(path, "r+") as file:
            change(file)
    for file, facts in times.items():
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def relabel(root: Any) -> None:
    codes = root["obs/kind/codes"]
    codes[7] = 1 - codes[7]


def recount(root: Any) -> None:
    root["X/data"][11] = 97


def rename_category(root: Any) -> None:
    root["obs/kind/categories"][1] = "c"


def rename_gene(root: Any) -> None:
    root["var/_index"][3] = "ENSG99999999999"


def reorder(root: Any) -> None:
    root["obs"].attrs["column-order"] = ["depth", "kind"]


@pytest.mark.parametrize("container", FOLDERS)
@pytest.mark.parametrize("do", [relabel, recount, rename_category, rename_gene, reorder])
def test_any_change_in_place_is_seen(tmp_path: Path, container: str, do: Change) -> None:
    path = write(make_adata(), tmp_path, container)
    before = fingerprint(path)
    change(path, do)
    assert fingerprint(path) != before


@pytest.mark.parametrize("container", CONTAINERS)
def test_times_names_and_copies_do_not_matter(tmp_path: Path, container: str) -> None:
    path = write(make_adata(), tmp_path, container)
    before = fingerprint(path)
    for file in [path, *path.rglob("*")]:
        os.utime(file, (1, 1))
    assert fingerprint(path) == before
    copy = path.with_name(f"copy{path.suffix}")
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
    assert fingerprint(copy) == before


@pytest.mark.parametrize("container", FOLDERS)
def test_what_is_not_read_does_not_matter(tmp_path: Path, container: str) -> None:
    """A layer beside the matrix, or an embedding that was added."""
    path = write(make_adata(), tmp_path, container)
    before = fingerprint(path), fingerprint(path, layer="counts")

    def add(root: Any) -> None:
        root["layers/counts/data"][5] = 89

    change(path, add)
    assert fingerprint(path) == before[0]
    assert fingerprint(path, layer="counts") != before[1]


@pytest.mark.parametrize("container", FOLDERS)
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_of_a_large_matrix_blocks_are_read_from_end_to_end(
    tmp_path: Path, container: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 2_000)
    monkeypatch.setattr(identity, "BLOCK_BYTES", 400)
    monkeypatch.setattr(identity, "LEAST_BLOCKS", 2)
    path = write(make_adata(layout), tmp_path, container)
    before = fingerprint(path)

    def scale(root: Any) -> None:
        data = root["X"] if layout == "dense" else root["X/data"]
        data[...] = data[...] * np.float32(2)

    def change_label(root: Any) -> None:
        root["obs/depth"][-1] = 1_009  # obs is read whole

    change(path, change_label)
    assert fingerprint(path) != before
    between = fingerprint(path)
    change(path, scale)
    assert fingerprint(path) != between


def test_reads_no_more_of_an_array_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 8_009)
    monkeypatch.setattr(identity, "BLOCK_BYTES", 97)

    class Counted:
        """An array that notes what is read of it."""

        name = "/X/data"

        def __init__(self) -> None:
            self.dtype, self.shape, self.chunks = np.dtype(np.uint8), (1_000_003,), (53,)
            self.attrs: dict[str, Any] = {}
            self.read: list[range] = []

        def __getitem__(self, rows: slice) -> np.ndarray:
            self.read.append(range(*rows.indices(self.shape[0])))
            return np.zeros(len(self.read[-1]), np.uint8)

    array = Counted()
    identity.content_digest([(array, False)], "cells")
    assert 0.9 * 8_009 < sum(map(len, array.read)) <= 8_009
    assert array.read[0].start == 0
    assert array.read[-1].stop == 1_000_003
    gaps = np.diff([rows.start for rows in array.read])
    assert gaps.max() < 2 * gaps.min()
    array.read.clear()
    identity.content_digest([(array, True)], "cells")
    assert sum(map(len, array.read)) == 1_000_003
