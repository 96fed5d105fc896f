"""What goes wrong reaches the consumer of the loader as one clear error, and nothing hangs."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import zarr

from cellpatch_fast import CellPatch, InputError, RaggedCells, pp
from cellpatch_fast.io import TokenStore
from cellpatch_fast.loading import CellLoader
from cellpatch_fast.preprocessing.masking import Masked, Masking, mask

from ..conftest import MakeCells, write_zarr
from ..io.stores.token_files import append, make_cells, open_writer, write_store
from .batches import assert_same, load, loading_threads, open_files, together

CHUNK, SHARD_CHUNKS = 101, 7  # of the token store
SHARD = 5  # that is damaged

Files = dict[str, Path]
Damage = Callable[[Path], None]


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A test that hangs ends the run, and says where."""
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def adata(make_cells: MakeCells) -> anndata.AnnData:
    return make_cells(211)


@pytest.fixture(scope="module")
def tokens(adata: anndata.AnnData, small_model: CellPatch) -> RaggedCells:
    return pp.tokenize(adata, small_model.vocabulary, small_model.config)


@pytest.fixture(scope="module")
def originals(
    adata: anndata.AnnData,
    tokens: RaggedCells,
    small_model: CellPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Files:
    """The same cells in every format, many windows long."""
    folder = tmp_path_factory.mktemp("originals")
    files = {name: folder / name for name in ("tokens.zarr", "cells.zarr", "cells.h5ad")}
    write_store(
        *(files["tokens.zarr"], tokens),
        vocabulary=small_model.vocabulary,
        chunk_entries=CHUNK,
        shard_chunks=SHARD_CHUNKS,
    )
    write_zarr(adata, files["cells.zarr"])
    in_small_chunks(files["cells.zarr"])
    adata.write_h5ad(files["cells.h5ad"], compression="gzip")
    return files


def in_small_chunks(path: Path) -> None:
    root = zarr.open_group(path)
    for part in ("indices", "data"):
        array: Any = root[f"X/{part}"]
        options: dict[str, Any] = {
            "attributes": dict(array.attrs),
            "chunks": (CHUNK * SHARD_CHUNKS,),
        }
        root.create_array(f"X/{part}", data=array[:], overwrite=True, **options)
    zarr.consolidate_metadata(root.store)


@pytest.fixture
def files(originals: Files, tmp_path: Path) -> Files:
    """Copies, to be damaged."""
    copies = {name: tmp_path / name for name in originals}
    for name, path in originals.items():
        copy: Callable[..., Any] = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, copies[name])
    return copies


@pytest.fixture
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch."""
    monkeypatch.setattr("cellpatch_fast.loading.loader.WINDOW_BYTES", 1)


def assert_nothing_stays(folder: Path) -> None:
    gc.collect()
    assert loading_threads() == []
    assert open_files(str(folder)) == set()


# --- damaged files -----------------------------------------------------------------------------


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


@pytest.mark.usefixtures("_small_windows")
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
    content["attributes"]["cellpatch_tokens"]["format_version"] = 2
    metadata.write_text(json.dumps(content))
    with pytest.raises(InputError, match="format version 2 is not supported"):
        CellLoader(files["tokens.zarr"])
    assert_nothing_stays(tmp_path)


# --- errors of workers, and consumers that go away ---------------------------------------------


@pytest.mark.usefixtures("_small_windows")
@pytest.mark.parametrize("where", ["masking", "obs"])
def test_any_error_in_a_worker_reaches_the_consumer(
    originals: Files, small_model: CellPatch, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(cells: RaggedCells, rows: np.ndarray, **options: Any) -> Masked:
        if rows[0] >= 100:
            raise ZeroDivisionError("in masking")
        return mask(cells, rows, **options)

    options: dict[str, Any] = {"batch_size": 10, "obs": ["n"], "masking": Masking()}
    with CellLoader(originals["tokens.zarr"], small_model.vocabulary, **options) as loader:
        if where == "masking":
            monkeypatch.setattr("cellpatch_fast.loading.loader.mask", fail)
        else:
            loader._obs["n"] = loader._obs["n"][:100]
        batches = iter(loader)
        for _ in range(10):
            next(batches)
        with pytest.raises(ZeroDivisionError if where == "masking" else IndexError):
            next(batches)
        assert loading_threads() == []
        assert next(batches, None) is None


def test_a_forgotten_iterator_ends_its_threads(originals: Files) -> None:
    with CellLoader(originals["tokens.zarr"], batch_size=3, threads=3) as loader:
        batches = iter(loader)
        next(batches)
        assert loading_threads()
        del batches
        gc.collect()
        assert loading_threads() == []


def test_a_consumer_thread_that_dies_ends_the_threads(originals: Files) -> None:
    died: list[bool] = []

    def consume() -> None:
        try:
            for _ in loader:
                raise ZeroDivisionError
        except ZeroDivisionError:
            died.append(True)

    with CellLoader(originals["tokens.zarr"], batch_size=3, threads=3) as loader:
        consumer = threading.Thread(target=consume)
        consumer.start()
        consumer.join()
        assert died
        gc.collect()
        assert loading_threads() == []


@pytest.mark.usefixtures("_small_windows")
@pytest.mark.parametrize("name", ["tokens.zarr", "cells.zarr", "cells.h5ad"])
def test_two_iterations_at_a_time_do_not_disturb_each_other(
    originals: Files, small_model: CellPatch, tokens: RaggedCells, name: str
) -> None:
    """In turns, one ahead of the other, and in two threads."""
    options: dict[str, Any] = {"batch_size": 3, "threads": 2}
    found: list[list[Any]] = [[], [], [], []]

    def consume(into: list[Any]) -> None:
        into.extend(loader)

    with CellLoader(
        originals[name], small_model.vocabulary, small_model.config, **options
    ) as loader:
        first, second = iter(loader), iter(loader)
        found[0] += [next(first) for _ in range(4)]
        for batch in second:
            found[1].append(batch)
            found[0] += [batch for batch in [next(first, None)] if batch is not None]
        consumers = [threading.Thread(target=consume, args=(into,)) for into in found[2:]]
        for consumer in consumers:
            consumer.start()
        for consumer in consumers:
            consumer.join()
    for batches in found:
        assert_same(together(batches), tokens)


@pytest.mark.parametrize("small", [False, True], ids=["read_already", "not_yet_read"])
def test_a_loader_closed_while_iterating_says_so(
    originals: Files, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if small:
        monkeypatch.setattr("cellpatch_fast.loading.loader.WINDOW_BYTES", 1)
    loader = CellLoader(originals["tokens.zarr"], batch_size=3, threads=2)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(ValueError, match="the loader was closed: keep it open"):
        next(batches)
    assert loading_threads() == []
    with pytest.raises(ValueError, match="the loader was closed: keep it open"):
        next(iter(loader))
    loader.close()


# --- Ctrl-C ------------------------------------------------------------------------------------

INTERRUPTED = """
import faulthandler, sys, threading, time

faulthandler.dump_traceback_later(60, exit=True)
from cellpatch_fast.loading import loader
from cellpatch_fast.io.chunks.direct import DirectChunks

loader.WINDOW_BYTES = 1
read = DirectChunks.read

def consume(what):
    with loader.CellLoader(sys.argv[1], batch_size=3, threads=2) as batches:
        for number, _ in enumerate(batches):
            if number == 2:
                print(what, flush=True)
                time.sleep(50)

def blocked(chunks, numbers, out):
    print("blocked", flush=True)
    time.sleep(0.5)
    read(chunks, numbers, out)

def interrupted():
    raised = False
    try:
        consume("slow")
    except KeyboardInterrupt:
        raised = True
    threads = [thread.name for thread in threading.enumerate()]
    loading = [name for name in threads if name.startswith("cellpatch")]
    print("ended", raised, *loading, flush=True)

interrupted()
DirectChunks.read = blocked
interrupted()
DirectChunks.read = read
for _ in loader.CellLoader(sys.argv[1], batch_size=3, threads=2):
    print("uncaught", flush=True)
    time.sleep(50)
"""


def test_ctrl_c_ends_the_process(originals: Files) -> None:
    """While the consumer is slow, while it waits for a worker that is blocked, and uncaught."""
    command = [sys.executable, "-c", INTERRUPTED, str(originals["tokens.zarr"])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for moment in ("slow", "blocked"):
            assert process.stdout.readline() == f"{moment}\n"
            process.send_signal(signal.SIGINT)
            while (line := process.stdout.readline()) == "blocked\n":
                pass
            assert line == "ended True\n"
        assert process.stdout.readline() == "uncaught\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
