"""Files are written whole or not at all: a kill or a power cut leaves the old or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path


def write_whole(path: str | Path, content: bytes | memoryview | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` in one step, through a file beside it."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name without its content
        os.replace(unfinished, path)
        to_disk(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def is_unfinished(path: Path, names: Collection[str] | None = None) -> bool:
    """Whether a kill has left this of writing a file (with one of ``names``) in one step."""
    match = re.fullmatch(r"\.(.+)\.\d+\.unfinished", path.name)
    return match is not None and (names is None or match[1] in names)


def to_disk(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on the disk, not only in memory.

    A folder's are needed where one name may only arrive after another.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot do so with a folder, and are in order without
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a new file or folder, which is renamed at the end.

    It is deleted if it does not come to that. There must be nothing at ``path``.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.rename(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def names_to_disk(path: Path, top: Path) -> None:
    """See to the disk the folders that ``path`` lies in, from below, up to ``top``."""
    for folder in path.parents:
        to_disk(folder)
        if folder == top:
            return


def tree_to_disk(folder: Path) -> None:
    """See a folder to the disk: its files, then the names in it, from below."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            to_disk(Path(place, name))
        to_disk(Path(place))


def make_folders(path: Path) -> None:
    """Make a folder, and those above it that are missing, and see their names to the disk.

    Raises
    ------
    NotADirectoryError
        If a file is in the way.
    """
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    make_folders(path.parent)
    path.mkdir(exist_ok=True)
    to_disk(path.parent)
