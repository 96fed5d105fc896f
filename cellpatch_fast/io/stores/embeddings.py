"""The embedding store: a valid AnnData Zarr store, written in shards of whole rows.

`partial` says how it becomes complete or stays resumable. Here a shard is a range of rows: one file
of each array in obsm (the embedding; the probabilities of classes), written once. Shards may be
written in any order, and those that are missing or cut are computed again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files import names_to_disk, to_disk
from ..interfaces import reading
from .partial import DELETE, PartialStore

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
    rows
        Number of cells.
    widths
        The arrays to make in obsm: their names, and their numbers per cell.
    dtype
        Their type.

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
        widths: Mapping[str, int],
        dtype: np.dtype[Any],
        *,
        overwrite: bool = False,
    ) -> None:
        self.rows, self.widths, self.dtype = rows, dict(widths), dtype
        self.shard_rows = shard_rows(sum(widths.values()), dtype)
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

    def write(
        self, shard: int, blocks: Mapping[str, np.ndarray], counts: Mapping[str, int]
    ) -> None:
        """Write the rows of a shard, [rows, width] of each array, and note that it is done."""
        start, stop = self.bounds(shard)
        for key, width in self.widths.items():
            if blocks[key].shape != (stop - start, width):
                raise ValueError(
                    f"shard {shard} of {key} is {stop - start} x {width}: {blocks[key].shape}"
                )
            self._arrays[key][start:stop] = blocks[key]
        size = 0
        for file in self._shard_files(shard):
            to_disk(file)
            names_to_disk(file, self.store)
            size += file.stat().st_size
        self._shards[shard] = {**counts, "bytes": size}
        self._write_journal()

    def read(self, key: str, start: int, stop: int) -> np.ndarray:
        """Rows that are written already.

        Raises
        ------
        InputError
            If they are damaged.
        """
        array = self._arrays[key]
        rows = np.empty((stop - start, *array.shape[1:]), array.dtype)
        size = array.chunks[0]
        for chunk in range(start // size, -(-stop // size)):
            first, last = max(start, chunk * size), min(stop, (chunk + 1) * size)
            file = f"obsm/{key}/c/{first // array.shards[0]}/0"
            what = f"rows {first} to {last - 1} of obsm/{key}, stored in the chunk file {file}"
            with reading(str(self.store), what, DELETE):
                rows[first - start : last - start] = array[first:last]
        return rows

    def add_columns(self, columns: Mapping[str, Any]) -> None:
        """Add columns to obs, in place of some of the same names: arrays of one element a row."""
        from anndata.io import write_elem

        group: Any = self._root["obs"]
        for name, values in columns.items():
            write_elem(group, name, values)
        order = [name for name in group.attrs["column-order"] if name not in columns]
        group.attrs["column-order"] = [*order, *columns]

    def finish(self) -> dict[str, int]:
        """Complete the store and give it its name; returns the counts' sums over all shards."""
        from anndata.io import write_elem

        if not self._prepared or self.missing:
            raise ValueError("the store is not complete")
        shards = self._shards.values()
        counts = {
            name: sum(shard[name] for shard in shards)
            for name in next(iter(shards))
            if name != "bytes"
        }
        for key in self.widths:
            params: Any = self._root[f"uns/{key}/params"]
            for name, count in counts.items():
                write_elem(params, name, count)
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
        self._arrays: dict[str, Any] = {key: self._root[f"obsm/{key}"] for key in self.widths}
        (self.shard_rows,) = {array.shards[0] for array in self._arrays.values()}
        for shard, counts in ((int(number), counts) for number, counts in done.items()):
            files = self._shard_files(shard)
            if all(file.is_file() for file in files) and (
                sum(file.stat().st_size for file in files) == counts["bytes"]
            ):
                self._shards[shard] = counts
        for shard in self.missing:
            for file in self._shard_files(shard):
                if file.parent.exists():
                    shutil.rmtree(file.parent)

    def _create(self, write_obs: Callable[[zarr.Group], None]) -> None:
        import pandas as pd
        import zarr
        from anndata.io import write_elem
        from zarr.codecs import Crc32cCodec

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
        write_elem(self._root, "uns", {key: {"params": self.settings} for key in self.widths})
        self._arrays = {
            key: self._root.create_array(
                f"obsm/{key}",
                shape=(self.rows, width),
                dtype=self.dtype,
                chunks=(CHUNK_ROWS, width),
                shards=(self.shard_rows, width),
                compressors=Crc32cCodec(),  # floats of an embedding hardly compress
                attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
            )
            for key, width in self.widths.items()
        }

    def _shard_files(self, shard: int) -> list[Path]:
        return [self.store / "obsm" / key / "c" / str(shard) / "0" for key in self.widths]
