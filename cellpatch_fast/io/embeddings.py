"""The embedding store: a valid AnnData Zarr store that is written in shards and can be resumed.

It grows beside its final place::

    OUTPUT.partial/
        cellpatch-journal.json   what the embeddings depend on, and which shards are done
        cellpatch-lock           held by the one process that writes
        store/                   becomes OUTPUT, in one step, when everything is in it

So whatever is called OUTPUT is complete. A shard is one file, written once, in whole; the journal
is replaced in one step when a shard is on the disk. A kill at any moment thus loses at most the
shard in work, and a resumed run ends with the same bytes as an uninterrupted one. A run that
differs in anything the embeddings depend on (model, inputs, settings) does not continue an old
one: it is refused, with the difference named.

Nothing is ever deleted that is not an embedding store, and an old one is replaced only when the
new one is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .arrays import reading

if TYPE_CHECKING:
    import zarr

logger = logging.getLogger("cellpatch_fast")

FORMAT_VERSION = 1
CHUNK_ROWS = 1024  # what a reader decodes at once: 2.6 MB at the paper's sizes
SHARD_BYTES = 1 << 26  # of one file
SHARD_CHUNKS = 128  # at most: what a kill may cost is some seconds, however narrow the rows
ATTRIBUTE = "cellpatch"  # of a finished store: settings, counts, version

JOURNAL = "cellpatch-journal.json"
LOCK = "cellpatch-lock"
STORE = "store"
REPLACED = "replaced"  # where an old store waits for its deletion
OURS = {JOURNAL, f"{JOURNAL}.new", LOCK, STORE, REPLACED}
DELETE = "Delete the folder and start anew"


def shard_rows(width: int, dtype: np.dtype[Any]) -> int:
    """Cells per shard: whole chunks, about `SHARD_BYTES` together."""
    chunks = SHARD_BYTES // (CHUNK_ROWS * width * dtype.itemsize)
    return min(max(1, chunks), SHARD_CHUNKS) * CHUNK_ROWS


def partial_of(output: Path) -> Path:
    """Where a store lies until it is complete."""
    return output.with_name(output.name + ".partial")


def finished_facts(output: Path) -> dict[str, Any] | None:
    """``settings``, ``counts`` and ``version`` of a finished store; None if it is no such store."""
    try:
        metadata = json.loads((output / "zarr.json").read_text())
        facts = metadata["attributes"][ATTRIBUTE]
        return facts if facts.keys() >= {"settings", "counts", "version"} else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # whatever lies there, it is not ours


def unfinished_facts(partial: Path) -> dict[str, Any] | None:
    """The journal of unfinished work; None if there is none, `InputError` if it is not usable."""
    path = partial / JOURNAL
    if not path.is_file():
        return None
    try:
        journal = json.loads(path.read_text())
        newer = journal["format_version"] > FORMAT_VERSION
        damage = ", ".join({"version", "settings", "prepared", "done"} - journal.keys())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        newer, damage = False, str(error)
    if newer:
        raise InputError(
            f"{partial} was begun by a newer cellpatch-fast ({journal.get('version')}; this is "
            f"{version('cellpatch-fast')}): finish it with that, or delete it and start anew"
        )
    if damage:
        raise InputError(f"{path} is damaged ({damage}): delete {partial} and start anew")
    return journal


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, one per line, to end a message with."""
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return "".join(
        f"\n  {key}: was {before.get(key, 'not set')!r}, is now {now.get(key, 'not set')!r}"
        for key in keys
    )


class EmbeddingWriter:
    """Writes an embedding store, or goes on with one that was interrupted. A context manager.

    `prepare` it, `write` the shards that are `missing`, then `finish`.

    Parameters
    ----------
    output
        The store's final place.
    settings
        All that the embeddings depend on, JSON values by readable names.
    rows, width, dtype
        Shape and type of the embedding.
    key
        Its name in obsm.
    overwrite
        Replace the embedding store at ``output`` once the new one is complete, and drop
        unfinished work that was begun with other settings.

    Raises
    ------
    InputError
        If there is something at ``output``, another process is writing, or unfinished work was
        begun with other settings.
    """

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
        self.output, self.partial, self.store = (
            output,
            partial_of(output),
            partial_of(output) / STORE,
        )
        self.settings, self.key = json.loads(json.dumps(settings)), key
        self.rows, self.width, self.dtype = rows, width, dtype
        self.shard_rows = shard_rows(width, dtype)
        self._done: dict[int, dict[str, int]] = {}
        self._prepared = False
        self._lock: int | None = _locked(self.partial)
        try:
            if not overwrite and is_taken(output):
                raise InputError(f"{output} exists: another process has just made it")
            self._open(overwrite)
        except BaseException:
            self.close()
            raise

    @property
    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        shards = -(-self.rows // self.shard_rows)
        return [shard for shard in range(shards) if shard not in self._done]

    @property
    def rows_done(self) -> int:
        bounds = (self.bounds(shard) for shard in self._done)
        return sum(stop - start for start, stop in bounds)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first row of a shard and the one after its last."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)

    def prepare(self, write_obs: Callable[[zarr.Group], None]) -> None:
        """Write everything but the embedding, unless that is done.

        ``write_obs`` is given the store's root to write the group ``obs`` there.
        """
        if self._prepared:
            return
        if self.store.exists():  # half-prepared
            shutil.rmtree(self.store)
        with _anndata_settings():
            self._create(write_obs)
        self._prepared = True
        self._write_journal()

    def write(self, shard: int, block: np.ndarray, counts: Mapping[str, int]) -> None:
        """Write the rows of a shard [rows, width] and note that it is done, with its counts."""
        start, stop = self.bounds(shard)
        if block.shape != (stop - start, self.width):
            raise ValueError(f"shard {shard} is {stop - start} x {self.width}: {block.shape}")
        self._array[start:stop] = block
        file = self._shard_file(shard)
        _to_disk(file)
        self._done[shard] = {**counts, "bytes": file.stat().st_size}
        self._write_journal()

    def finish(self) -> dict[str, int]:
        """Complete the store and give it its name; returns the counts' sums over all shards."""
        if not self._prepared or self.missing:
            raise ValueError("the store is not complete")
        shards = self._done.values()
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
        if is_taken(self.output):
            os.rename(self.output, self.partial / REPLACED)
        os.rename(self.store, self.output)
        _remove(self.partial)
        return counts

    def close(self) -> None:
        """Let others write; what is done stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, overwrite: bool) -> None:
        """Go on with the work in `partial` if there is any, else claim it."""
        strangers = {path.name for path in self.partial.iterdir()} - OURS
        if strangers:
            raise InputError(
                f"{self.partial} holds {', '.join(sorted(strangers)[:3])}, so it is no unfinished "
                "embedding store: move it away, or choose another output"
            )
        replaced = self.partial / REPLACED
        if replaced.exists() and not self.output.exists():  # killed between two renamings
            os.rename(replaced, self.output)
        try:
            journal = unfinished_facts(self.partial)
            if journal is not None:
                self._require_same(journal)
        except InputError:
            if not overwrite:
                raise
            journal = None
        if journal is not None and journal["prepared"] and (self.store / "zarr.json").is_file():
            self._resume(journal)
        else:
            self._write_journal()

    def _require_same(self, journal: Mapping[str, Any]) -> None:
        before = {**journal["settings"], "version of cellpatch-fast": journal["version"]}
        now = {**self.settings, "version of cellpatch-fast": version("cellpatch-fast")}
        if before != now:
            raise InputError(
                f"{self.partial} holds the unfinished work of a run with other settings. Repeat "
                "that run to finish it, or start anew with --overwrite "
                f"(overwrite=True).{differences(before, now)}"
            )

    def _resume(self, journal: Mapping[str, Any]) -> None:
        """Take over the shards that are there; remove what a kill has left half-written."""
        import zarr

        with reading(str(self.store), "the unfinished store", DELETE):
            self._root = zarr.open_group(self.store, mode="r+")
            self._array: zarr.Array[Any] = self._root[f"obsm/{self.key}"]  # type: ignore[assignment]
            assert self._array.shards is not None
            self.shard_rows = self._array.shards[0]
        self._prepared = True
        for shard, counts in journal["done"].items():
            file = self._shard_file(int(shard))
            if file.is_file() and file.stat().st_size == counts["bytes"]:
                self._done[int(shard)] = counts
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

    def _write_journal(self) -> None:
        journal = {
            "format_version": FORMAT_VERSION,
            "version": version("cellpatch-fast"),
            "settings": self.settings,
            "prepared": self._prepared,
            "done": self._done,
        }
        replacement = self.partial / f"{JOURNAL}.new"
        replacement.write_text(json.dumps(journal))
        _to_disk(replacement)
        os.replace(replacement, self.partial / JOURNAL)


def is_taken(output: Path) -> bool:
    """Whether there is something at ``output`` that a new store would replace."""
    return output.exists() and not (output.is_dir() and not any(output.iterdir()))


def tidy(output: Path) -> None:
    """Remove what a run that was killed after its last step has left beside a finished store."""
    partial = partial_of(output)
    if partial.is_dir() and {path.name for path in partial.iterdir()} <= OURS - {STORE}:
        with contextlib.suppress(InputError):  # another process is at work there
            lock = _locked(partial)
            _remove(partial)
            os.close(lock)


def _remove(partial: Path) -> None:
    """Delete the folder of a store that is finished; the journal says until the end whose it is."""
    if (partial / REPLACED).exists():
        shutil.rmtree(partial / REPLACED)
    for name in (f"{JOURNAL}.new", JOURNAL, LOCK):
        (partial / name).unlink(missing_ok=True)
    partial.rmdir()


def _locked(partial: Path) -> int:
    """Make the folder and lock it; the system takes the lock back when the process ends."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        path = partial / LOCK
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise InputError(
                f"{partial}: another process is writing this store; wait until it is done"
            ) from error
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no other process writes there",
                *(partial, error.strerror),
            )
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock)):
            return lock
        os.close(lock)  # the process that held it has just finished and removed the folder


def _to_disk(path: Path) -> None:
    """Return when the file's content is on the disk, not only in the system's memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _anndata_settings() -> Iterator[None]:
    """anndata's defaults differ between versions: say what to write."""
    import anndata

    with anndata.settings.override(
        zarr_write_format=3, auto_shard_zarr_v3=False, allow_write_nullable_strings=True
    ):
        yield
