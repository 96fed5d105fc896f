"""A store that is written over hours: complete or not there, and resumable at any moment.

It grows beside its final place::

    OUTPUT.partial/
        cellpatch-journal.json   what its content depends on, and what of it is done
        cellpatch-lock           held by the one process that writes
        store/                   becomes OUTPUT, in one step, when everything is in it
        work/                    what only the writing needs
        replaced/                the old store, while the new one takes its place
        discarded/               the old store, while it is deleted

So whatever is called OUTPUT is complete. Files are written once, in whole; the journal is
replaced in one step when they are on the disk, and so are their names: first the files, then the
folders from below, then the journal. A kill or a power cut at any moment thus loses at most the
file in work, and a resumed run ends with the same bytes as an uninterrupted one. A run that differs
in anything the content depends on (model, inputs, settings) does not continue an old one: it is
refused, with the difference named.

Nothing is ever deleted that is not a store of the same kind, and an old one is replaced only when
the new one is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ...errors import InputError
from ...files import is_unfinished, make_folders, to_disk, tree_to_disk, write_whole
from ..interfaces import reading

if TYPE_CHECKING:
    import zarr

logger = logging.getLogger("cellpatch_fast")

FORMAT_VERSION = 2  # of the journal and what it speaks of

JOURNAL = "cellpatch-journal.json"
LOCK = "cellpatch-lock"
STORE = "store"
WORK = "work"
REPLACED = "replaced"  # the old store, complete
DISCARDED = "discarded"  # what is left of it
OURS = {JOURNAL, LOCK, STORE, WORK, REPLACED, DISCARDED}
DELETE = "Delete the folder and start anew"


class PartialStore(ABC):
    """A store in the making, or the rest of one that was interrupted. A context manager.

    `prepare` it, write what a subclass writes, then finish.

    Parameters
    ----------
    output
        The store's final place.
    settings
        All that the content depends on, JSON values by readable names.
    overwrite
        Replace the store at ``output`` once the new one is complete, and drop unfinished work
        that was begun with other settings.

    Raises
    ------
    InputError
        If there is something at ``output``, another process is writing, or unfinished work was
        begun with other settings.
    """

    KIND: ClassVar[str]  # in words

    def __init__(self, output: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.output, self.partial = output, partial_of(output)
        self.store, self.work = self.partial / STORE, self.partial / WORK
        self.settings = json.loads(json.dumps(settings))
        self._prepared = False
        self._lock: int | None = locked(self.partial)
        try:
            if not overwrite and is_taken(output):
                raise InputError(f"{output} exists: another process has just made it")
            self._open(overwrite)
        except BaseException:
            self.close()
            raise

    def prepare(self, write_obs: Callable[[zarr.Group], None]) -> None:
        """Write everything but the arrays of entries or features, unless that is done.

        ``write_obs`` is given the store's root to write the group ``obs`` there.
        """
        if self._prepared:
            return
        for folder in (self.store, self.work):
            if folder.exists():  # half-prepared, or of other settings
                shutil.rmtree(folder)
        with _anndata_settings():
            self._create(write_obs)
        tree_to_disk(self.partial)
        self._prepared = True
        self._write_journal()

    def close(self) -> None:
        """Let others write; what is done stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _create(self, write_obs: Callable[[zarr.Group], None]) -> None:
        """Make `store` with all that is known before the first shard."""

    @abstractmethod
    def _done(self) -> Any:
        """What is on the disk, for the journal; a JSON value."""

    @abstractmethod
    def _resume(self, done: Any) -> None:
        """Take over what a journal says is done; remove what a kill has left half-written."""

    def _write_journal(self) -> None:
        journal = {
            "format_version": FORMAT_VERSION,
            "version": version("cellpatch-fast"),
            "kind": self.KIND,
            "settings": self.settings,
            "prepared": self._prepared,
            "done": self._done(),
        }
        write_whole(self.partial / JOURNAL, json.dumps(journal))

    def _publish(self) -> None:
        """Give the complete store its name."""
        tree_to_disk(self.store)
        if is_taken(self.output):
            _rename(self.output, self.partial / REPLACED)
        _rename(self.store, self.output)
        _remove(self.partial)

    def _open(self, overwrite: bool) -> None:
        """Go on with the work in `partial` if there is any, else claim it."""
        strangers = _names_in(self.partial) - OURS
        if strangers:
            raise InputError(
                f"{self.partial} holds {', '.join(sorted(strangers)[:3])}, so it is no unfinished "
                f"{self.KIND}: move it away, or choose another output"
            )
        replaced = self.partial / REPLACED
        if replaced.exists() and not is_taken(self.output):  # killed between two renamings
            _rename(replaced, self.output)
        _discard(self.partial)  # killed while it was deleted
        _forget_journals(self.partial)
        try:
            journal = unfinished_facts(self.partial)
            if journal is not None:
                self._require_same(journal)
        except InputError:
            if not overwrite:
                raise
            journal = None
        if journal is not None and journal["prepared"] and (self.store / "zarr.json").is_file():
            for path in self.store.rglob("*"):
                if is_unfinished(path) or (path.suffix == ".partial" and path.is_file()):
                    path.unlink()  # Zarr begins every file under the latter kind of name
            with reading(str(self.store), "the unfinished store", DELETE):
                self._resume(journal["done"])
            self._prepared = True
        else:
            self._write_journal()

    def _require_same(self, journal: Mapping[str, Any]) -> None:
        now = {
            "kind": self.KIND,
            **self.settings,
            "version of cellpatch-fast": version("cellpatch-fast"),
            "format version": FORMAT_VERSION,
        }
        before = {
            "kind": journal["kind"],
            **journal["settings"],
            "version of cellpatch-fast": journal["version"],
            "format version": journal["format_version"],
        }
        if before != now:
            raise InputError(
                f"{self.partial} holds the unfinished work of a run with other settings. Repeat "
                "that run to finish it, or start anew with --overwrite "
                f"(overwrite=True).{differences(before, now)}"
            )


def partial_of(output: Path) -> Path:
    """Where a store lies until it is complete."""
    return output.with_name(output.name + ".partial")


def is_taken(output: Path) -> bool:
    """Whether there is something at ``output`` that a new store would replace."""
    return output.exists() and not (output.is_dir() and not any(output.iterdir()))


def finished_facts(output: Path, attribute: str) -> dict[str, Any] | None:
    """What the root of a finished store says in ``attribute``; None if it is no such store.

    At least ``settings``, ``counts`` and ``version``.
    """
    try:
        metadata = json.loads((output / "zarr.json").read_text())
        facts = metadata["attributes"][attribute]
        return facts if facts.keys() >= {"settings", "counts", "version"} else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # whatever lies there, it is not ours


def finished_counts(output: Path, attribute: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """The counts of a finished store, if it is what a run with ``settings`` would make.

    Raises
    ------
    InputError
        If it was made with other settings.
    """
    tidy(output)
    facts = finished_facts(output, attribute)
    if facts is None or facts["settings"] != settings:
        before = facts["settings"] if facts else {}
        raise InputError(
            f"{output} exists and was made with other settings: choose another output, or "
            f"replace it with --overwrite (overwrite=True).{differences(before, settings)}"
        )
    return dict(facts["counts"])


def unfinished_facts(partial: Path) -> dict[str, Any] | None:
    """The journal of unfinished work; None if there is none, `InputError` if it is not usable."""
    path = partial / JOURNAL
    if not path.is_file():
        return None
    try:
        journal = json.loads(path.read_text())
        newer = journal["format_version"] > FORMAT_VERSION
        damage = ", ".join({"version", "kind", "settings", "prepared", "done"} - journal.keys())
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


def tidy(output: Path) -> None:
    """Remove what a run that was killed after its last step has left beside a finished store."""
    partial = partial_of(output)
    if partial.is_dir() and _names_in(partial) <= OURS - {STORE}:
        with contextlib.suppress(InputError):  # another process is at work there
            lock = locked(partial)
            try:
                _remove(partial)
            finally:
                os.close(lock)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, one per line, to end a message with."""
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return "".join(
        f"\n  {key}: was {before.get(key, 'not set')!r}, is now {now.get(key, 'not set')!r}"
        for key in keys
    )


def _remove(partial: Path) -> None:
    """Delete the folder of a store that is finished; the journal says until the end whose it is."""
    _discard(partial)
    if (partial / WORK).exists():
        shutil.rmtree(partial / WORK)
    _forget_journals(partial)
    for name in (JOURNAL, LOCK):
        (partial / name).unlink(missing_ok=True)
    partial.rmdir()


def _names_in(partial: Path) -> set[str]:
    """What lies there, but for journals that a kill has left half-written."""
    return {path.name for path in partial.iterdir() if not is_unfinished(path, {JOURNAL})}


def _forget_journals(partial: Path) -> None:
    """Delete those that a kill has left half-written."""
    for path in partial.iterdir():
        if is_unfinished(path, {JOURNAL}):
            path.unlink()


def _discard(partial: Path) -> None:
    """Delete an old store, under a name that says that it is no longer complete."""
    discarded = partial / DISCARDED
    if discarded.exists():
        shutil.rmtree(discarded)
    if (partial / REPLACED).exists():
        _rename(partial / REPLACED, discarded)
        shutil.rmtree(discarded)


def _rename(source: Path, target: Path) -> None:
    """Rename a folder; its new name is on the disk before anything else happens."""
    os.rename(source, target)
    to_disk(target.parent)
    to_disk(source.parent)


def locked(partial: Path) -> int:
    """Make the folder and lock it; the system takes the lock back when the process ends."""
    while True:
        make_folders(partial)
        path = partial / LOCK
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise InputError(
                f"{partial}: another process is writing there; wait until it is done"
            ) from error
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no other process writes there",
                partial,
                error.strerror,
            )
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock)):
            return lock
        os.close(lock)  # the process that held it has just finished and removed the folder


@contextlib.contextmanager
def _anndata_settings() -> Iterator[None]:
    """anndata's defaults differ between versions: say what to write."""
    import anndata

    with anndata.settings.override(
        zarr_write_format=3, auto_shard_zarr_v3=False, allow_write_nullable_strings=True
    ):
        yield
