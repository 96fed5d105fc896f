"""The embedding store: a valid AnnData Zarr store, written in shards of whole rows.

`partial` says how it becomes complete or stays resumable. Here a shard is one file, written once;
shards may be written in any order, and those that are missing or cut are computed again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .partial import PartialStore, to_disk

if TYPE_CHECKING:
    import zarr

CHUNK_ROWS = 1024  # what a reader decodes at once: 2.6 MB at the paper's sizes
SHARD_BYTES = 1 << 26  # of one file
SHARD_CHUNKS = 128  # at most: what a kill may cost is some seconds, however narrow the rows
ATTRIBUTE = "cellpatch"  # of a finished store: settings, counts, version


def shard_rows(width: int, dtype: np.dtype[Any]) -> int:
    """Cells per shard: whole chunks, about `SHARD_BYTES` together."""
    chunks = SHARD_BYTES // (CHUNK_ROWS * width * dtype.itemsize)
    return min(max(1, chunks), SHARD_CHUNKS) * CHUNK_ROWS


class EmbeddingWriter(PartialStore):
    """Writes an embedding store, or goes on with one that was interrupted. A context manager.

    `prepare` it, `write` the shards that are `missing`, then `finish`.

    Parameters
    ----------
    output, settings, overwrite
        As in `PartialStore`.
    rows, width, dtype
        Shape and type of the embedding.
    key
        Its name in obsm.

    Raises
    ------
    InputError
        As in `PartialStore`.
    """

    KIND = "embedding store"

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        rows: int,
        width: int,
        dtype: np.dtype[Any],
        key: str,
        *,
        overwrite: bool = False,
    ) -> None:
        self.rows, self.width, self.dtype, self.key = rows, width, dtype, key
        self.shard_rows = shard_rows(width, dtype)
        self._shards: dict[int, dict[str, int]] = {}  # those that are done
        super().__init__(output, settings, overwrite=overwrite)

    @property
    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        shards = -(-self.rows // self.shard_rows)
        return [shard for shard in range(shards) if shard not in self._shards]

    @property
    def rows_done(self) -> int:
        bounds = (self.bounds(shard) for shard in self._shards)
        return sum(stop - start for start, stop in bounds)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first row of a shard and the one after its last."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)

    def write(self, shard: int, block: np.ndarray, counts: Mapping[str, int]) -> None:
        """Write the rows of a shard [rows, width] and note that it is done, with its counts."""
        start, stop = self.bounds(shard)
        if block.shape != (stop - start, self.width):
            raise ValueError(f"shard {shard} is {stop - start} x {self.width}: {block.shape}")
        self._array[start:stop] = block
        file = self._shard_file(shard)
        to_disk(file)
        self._shards[shard] = {**counts, "bytes": file.stat().st_size}
        self._write_journal()

    def finish(self) -> dict[str, int]:
        """Complete the store and give it its name; returns the counts' sums over all shards."""
        if not self._prepared or self.missing:
            raise ValueError("the store is not complete")
        shards = self._shards.values()
        counts = {
            name: sum(shard[name] for shard in shards)
            for name in next(iter(shards))
            if name != "bytes"
        }
        self._root.attrs[ATTRIBUTE] = {
            "settings": self.settings,
            "counts": counts,
            "version": version("cellpatch-fast"),
        }
        self._publish()
        return counts

    def _done(self) -> dict[int, dict[str, int]]:
        return self._shards

    def _resume(self, done: dict[str, dict[str, int]]) -> None:
        import zarr

        self._root = zarr.open_group(self.store, mode="r+")
        self._array: zarr.Array[Any] = self._root[f"obsm/{self.key}"]  # type: ignore[assignment]
        assert self._array.shards is not None
        self.shard_rows = self._array.shards[0]
        for shard, counts in ((int(number), counts) for number, counts in done.items()):
            file = self._shard_file(shard)
            if file.is_file() and file.stat().st_size == counts["bytes"]:
                self._shards[shard] = counts
        for shard in self.missing:
            shutil.rmtree(self._shard_file(shard).parent, ignore_errors=True)
        for leftover in self.store.glob("*.partial"):
            leftover.unlink()

    def _create(self, write_obs: Callable[[zarr.Group], None]) -> None:
        import pandas as pd
        import zarr
        from anndata.io import write_elem

        self._root = zarr.open_group(
            self.store,
            mode="w",
            zarr_format=3,
            attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"},
        )
        write_obs(self._root)
        write_elem(self._root, "var", pd.DataFrame(index=pd.Index([], dtype=str)))
        for group in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(self._root, group, {})
        write_elem(self._root, "uns", {self.key: {"params": self.settings}})
        self._array = self._root.create_array(
            f"obsm/{self.key}",
            shape=(self.rows, self.width),
            dtype=self.dtype,
            chunks=(CHUNK_ROWS, self.width),
            shards=(self.shard_rows, self.width),
            compressors=None,  # floats of an embedding hardly compress
            attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
        )

    def _shard_file(self, shard: int) -> Path:
        return self.store / "obsm" / self.key / "c" / str(shard) / "0"
