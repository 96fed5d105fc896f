"""The embedding store: a valid AnnData Zarr store that is written in shards and can be resumed.

While it grows it lies beside its final place, in ``OUTPUT.partial``, with a journal of the shards
that are done. Only when everything is in it is the folder renamed to ``OUTPUT``, so whatever
has that name is complete. Each shard is a file that is written once, in whole; the journal is
replaced in one step after a shard is written. So a kill at any moment loses at most the shard in
work, and a resumed run ends with the same bytes as an uninterrupted one.

The journal also holds what the embeddings depend on (model, inputs, settings). A run that differs
in any of it does not continue the old one: it is refused, with the difference named.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import zarr

FORMAT_VERSION = 1
CHUNK_ROWS = 1024  # what a reader decodes at once: 2.6 MB at the paper's sizes
SHARD_BYTES = 1 << 26  # of one file, before compression
JOURNAL = "cellpatch-journal.json"
SETTINGS = "cellpatch"  # key of uns that keeps what the embeddings depend on


def shard_rows(width: int, dtype: np.dtype[Any]) -> int:
    """Cells per shard: whole chunks that make up about `SHARD_BYTES`."""
    return max(1, SHARD_BYTES // (CHUNK_ROWS * width * dtype.itemsize)) * CHUNK_ROWS


def finished_settings(output: Path) -> dict[str, Any] | None:
    """What the embeddings in a finished store depend on; None if it is no such store."""
    import zarr

    try:
        root = zarr.open_group(output, mode="r")
        found = root.attrs.get(SETTINGS)
    except Exception as error:  # whatever lies there, it is not ours
        if isinstance(error, MemoryError):
            raise
        return None
    return dict(found) if isinstance(found, Mapping) else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, one per line, to end a message with."""
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return "".join(
        f"\n  {key}: was {before.get(key, 'not set')!r}, is now {now.get(key, 'not set')!r}"
        for key in keys
    )


class EmbeddingWriter:
    """Writes an embedding store, or goes on with one that was interrupted.

    Parameters
    ----------
    output
        The store's final place; must not exist.
    settings
        All that the embeddings depend on, JSON values by readable names.
    rows, width, dtype
        Shape and type of the embedding.
    key
        Its name in obsm.

    Attributes
    ----------
    done
        What was recorded for each finished shard, by number.
    shard_rows
        Rows of every shard but the last.

    Raises
    ------
    InputError
        If another run is writing there, or the interrupted one had other settings.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        rows: int,
        width: int,
        dtype: np.dtype[Any],
        key: str,
    ) -> None:
        self.output, self.partial = output, partial_of(output)
        self.settings, self.rows, self.width, self.key = dict(settings), rows, width, key
        self.dtype = dtype
        self.shard_rows = shard_rows(width, dtype)
        self.shards = -(-rows // self.shard_rows)
        self.done: dict[int, dict[str, int]] = {}
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = self._locked()
        try:
            self._array = self._resume() if (self.partial / JOURNAL).exists() else self._create()
        except BaseException:
            self.close()
            raise

    def has_obs(self) -> bool:
        """Whether the annotation of the cells is written."""
        return (self.partial / "obs" / "zarr.json").exists() and self._obs_done

    def write_obs(self, obs: pd.DataFrame) -> None:
        """Write the annotation of the cells, one row each."""
        import anndata

        with _zarr_v3():
            anndata.io.write_elem(self._root, "obs", obs)
        self._obs_done = True
        self._write_journal()

    def write(self, shard: int, block: np.ndarray, record: dict[str, int]) -> None:
        """Write a whole shard and record that it is done."""
        start = shard * self.shard_rows
        stop = min(self.rows, start + self.shard_rows)
        if block.shape != (stop - start, self.width):
            raise ValueError(f"shard {shard} is {stop - start} x {self.width}: {block.shape}")
        self._array[start:stop] = block
        self.done[shard] = record
        self._write_journal()

    def finish(self) -> None:
        """Complete the store and give it its final name."""
        if len(self.done) != self.shards or not self.has_obs():
            raise ValueError("the store is not complete")
        import anndata
        import pandas as pd

        with _zarr_v3():
            anndata.io.write_elem(self._root, "var", pd.DataFrame(index=pd.Index([], dtype=str)))
            for group in ("layers", "obsp", "varm", "varp"):
                anndata.io.write_elem(self._root, group, {})
            anndata.io.write_elem(self._root, "uns", {SETTINGS: {"params": self.settings}})
        self._root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        self._root.attrs[SETTINGS] = self.settings
        (self.partial / JOURNAL).unlink()
        os.rename(self.partial, self.output)
        self.close()

    def close(self) -> None:
        """Let others write; what is done stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _create(self) -> zarr.Array[Any]:
        import zarr

        self._obs_done = False
        with _zarr_v3():
            self._root = zarr.open_group(self.partial, mode="a", zarr_format=3)
            obsm = self._root.require_group("obsm")
            obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            array = obsm.create_array(
                self.key,
                shape=(self.rows, self.width),
                dtype=self.dtype,
                chunks=(min(CHUNK_ROWS, self.shard_rows), self.width),
                shards=(self.shard_rows, self.width),
                compressors=None,  # floats of an embedding hardly compress
                attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
                overwrite=True,
            )
        self._write_journal()
        return array

    def _resume(self) -> zarr.Array[Any]:
        import zarr

        journal = json.loads((self.partial / JOURNAL).read_text())
        if journal["settings"] != self.settings:
            raise InputError(
                f"{self.partial} holds the unfinished work of a run with other settings. Repeat "
                "that run to finish it, or start anew with --overwrite "
                f"(overwrite=True).{differences(journal['settings'], self.settings)}"
            )
        self._obs_done = journal["obs"]
        self._root = zarr.open_group(self.partial, mode="r+")
        array = self._root[f"obsm/{self.key}"]
        folder = self.partial / "obsm" / self.key / "c"
        self.done = {
            int(shard): record
            for shard, record in journal["done"].items()
            if (folder / shard / "0").exists()
        }
        return array  # type: ignore[return-value]

    def _write_journal(self) -> None:
        journal = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "obs": self._obs_done,
            "done": self.done,
        }
        replacement = self.partial / f"{JOURNAL}.new"
        replacement.write_text(json.dumps(journal))
        os.replace(replacement, self.partial / JOURNAL)

    def _locked(self) -> int:
        """A lock on the folder, which the system takes back when the process ends."""
        folder = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(folder)
            raise InputError(
                f"{self.partial}: another process is writing this store; wait until it is done"
            ) from error
        return folder


def partial_of(output: Path) -> Path:
    """Where a store lies until it is complete."""
    return output.with_name(output.name + ".partial")


def remove(output: Path) -> None:
    """Delete a store and the unfinished work for it."""
    for path in (output, partial_of(output)):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


@contextlib.contextmanager
def _zarr_v3() -> Iterator[None]:
    """anndata's defaults differ between versions: say what to write."""
    import anndata

    with anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        yield
