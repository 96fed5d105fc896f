"""Some files of a directory are replaced together: all of them, or none.

They are written into a folder beside the directory, ``.NAME.XXXXXXXX.unfinished``. When all are on
the disk it is renamed to ``.complete``, and from then on the new files count: they are moved in
one by one, in a given order, and what a kill leaves of that is done by the next process that
replaces these files, or asks for it (`settle`). The last file in the order is missing meanwhile, so
whoever looks at the directory can tell. A folder that did not become complete is deleted then.

The process that writes a folder holds a lock on it, which the system takes back when it ends; so
nobody touches what another process is writing. Where the file system cannot lock, what a kill
leaves stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import to_disk

UNFINISHED, COMPLETE = ".unfinished", ".complete"


def replace_together(directory: Path, order: Sequence[str], write: Callable[[Path], None]) -> None:
    """Replace the files in a directory that have the names in ``order``.

    Parameters
    ----------
    directory
        Made where missing. Other files in it stay.
    order
        All names that such files can have. The first one is always there; the last one says that
        all are.
    write
        Writes some of them, the first and the last at least, into the empty folder it is given.

    Raises
    ------
    OSError
        If they cannot be written, with the old files untouched; or not be moved, then
        `settle` does so.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    settle(directory, order)
    with contextlib.ExitStack() as stack:
        folder, lock = _new_folder(directory)
        stack.callback(os.close, lock)
        stack.callback(_remove, folder)
        write(folder)
        for file in folder.iterdir():
            to_disk(file)
        to_disk(folder)
        complete = folder.with_suffix(COMPLETE)
        os.rename(folder, complete)
        to_disk(directory.parent)
        _move_in(complete, directory, order)


def settle(directory: Path, order: Sequence[str]) -> None:
    """Bring to an end what killed processes have left: move in complete files, delete others."""
    for folder in _folders(directory):
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            if folder.suffix == COMPLETE:
                _move_in(folder, directory, order)
            else:
                shutil.rmtree(folder)
        finally:
            os.close(lock)


def waiting(directory: Path) -> Path | None:
    """A folder of complete files that are still to be moved into ``directory``."""
    return next((path for path in _folders(directory) if path.suffix == COMPLETE), None)


def _folders(directory: Path) -> list[Path]:
    """The folders beside a directory that were made here for it."""
    pattern = re.compile(rf"\.{re.escape(directory.name)}\.[a-z0-9_]{{8}}({UNFINISHED}|{COMPLETE})")
    if not directory.parent.is_dir():
        return []
    return [path for path in directory.parent.iterdir() if pattern.fullmatch(path.name)]


def _new_folder(directory: Path) -> tuple[Path, int]:
    """An empty folder for the files of a directory, and the lock on it."""
    while True:
        folder = Path(
            tempfile.mkdtemp(UNFINISHED, prefix=f".{directory.name}.", dir=directory.parent)
        )
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)  # taken for a leftover, in the moment before it was locked
            continue
        except OSError:
            return folder, lock  # no locks here, so nobody will get one and delete it
        if folder.exists():
            return folder, lock
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock on a leftover; None where it cannot be had, or the folder is gone."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # gone, or another user's
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # being written, or the file system has no locks
        os.close(lock)
        return None
    if folder.exists():
        return lock
    os.close(lock)
    return None


def _move_in(folder: Path, directory: Path, order: Sequence[str]) -> None:
    """Move complete files into a directory, or the rest of them."""
    directory.mkdir(exist_ok=True)
    if (folder / order[0]).exists():  # the beginning: no file was moved yet
        (directory / order[-1]).unlink(missing_ok=True)
        for name in order:
            if not (folder / name).exists():  # of what was there before
                (directory / name).unlink(missing_ok=True)
        to_disk(directory)
    for name in order:
        if (folder / name).exists():
            os.replace(folder / name, directory / name)
            to_disk(directory)  # so that they arrive in this order after a power cut too
    to_disk(directory.parent)
    shutil.rmtree(folder)


def _remove(folder: Path) -> None:
    """Delete a folder that did not become complete."""
    if folder.exists():
        shutil.rmtree(folder)
