"""What the journal says is done is on the disk, content and names, and so is a store with its name.

The disk is taken at its word: what it need not forget in a power cut is the content that a file
had when it was last seen to the disk, and the names that a folder then held.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellpatch_fast.io.sources.tables import FrameTable
from cellpatch_fast.io.stores import embeddings
from cellpatch_fast.io.stores.embeddings import EmbeddingWriter
from cellpatch_fast.io.stores.obs import write_obs
from cellpatch_fast.io.stores.partial import DISCARDED, JOURNAL, STORE, WORK, partial_of
from cellpatch_fast.io.stores.token_writer import LENGTHS

from .token_files import make_cells, write_store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds files by /proc")

ROWS, WIDTH = 53, 11


class Disk:
    """What would be there after a power cut."""

    def __init__(self) -> None:
        self.contents: dict[int, bytes] = {}  # by inode
        self.names: dict[int, set[str]] = {}

    def sync(self, descriptor: int) -> None:
        facts = os.fstat(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if stat.S_ISDIR(facts.st_mode):
            self.names[facts.st_ino] = set(os.listdir(path))
        else:
            self.contents[facts.st_ino] = path.read_bytes()

    def content(self, path: Path) -> bytes | None:
        return self.contents.get(path.stat().st_ino)

    def finds(self, path: Path, top: Path) -> bool:
        """Whether the names of a file, and of the folders it is in below ``top``, are there."""
        return path == top or (
            path.name in self.names.get(path.parent.stat().st_ino, ())
            and self.finds(path.parent, top)
        )

    def lost(self, top: Path, but: Callable[[Path], bool] = lambda path: False) -> list[str]:
        """The files below ``top`` that would be gone or not as they are."""
        return [
            str(path.relative_to(top))
            for path in top.rglob("*")
            if not (self.finds(path, top) or but(path))
            or (path.is_file() and self.content(path) != path.read_bytes() and not but(path))
        ]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk that is asked at every step that promises something."""
    disk = Disk()
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def see_to(descriptor: int) -> None:
        fsync(descriptor)
        disk.sync(descriptor)

    def note(source: Path, target: Path) -> None:
        if Path(target).name == JOURNAL:
            assert disk.content(Path(source)) == Path(source).read_bytes()
            require_done(disk, Path(target).parent, json.loads(Path(source).read_text()))
        replace(source, target)

    def publish(source: Path, target: Path) -> None:
        if source.name == STORE:
            assert disk.lost(source) == []
        elif target.name == DISCARDED:  # the old store may go if the new one is there to stay
            output = target.parent.with_suffix("")
            assert disk.finds(output, output.parent)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", see_to)
    monkeypatch.setattr(os, "replace", note)
    monkeypatch.setattr(os, "rename", publish)
    return disk


def require_done(disk: Disk, partial: Path, journal: dict[str, object]) -> None:
    """What a journal says is done is on the disk."""
    if not journal["prepared"]:
        return
    done = journal["done"]
    assert isinstance(done, dict)
    assert {STORE, WORK} - disk.names[partial.stat().st_ino] <= {WORK}
    if "shards" not in done:  # of an embedding store, nothing of which is in work
        assert disk.lost(partial / STORE) == []
        return
    shards = done["shards"]

    def in_work(path: Path) -> bool:
        """A later shard, or a folder that has no other."""
        names = [*path.parts[len(partial.parts) :], "0", "0"]
        return names[1] in ("genes", "values") and (
            not shards or (len(names) > 5 and int(names[3]) >= len(shards))
        )

    assert disk.lost(partial / STORE, but=in_work) == []
    if shards:
        lengths = disk.content(partial / WORK / LENGTHS)
        assert lengths is not None
        assert len(lengths) >= 4 * shards[-1]["cells"]
        assert disk.finds(partial / WORK / LENGTHS, partial)


def write_embeddings(output: Path) -> None:
    obs = pd.DataFrame({"n": np.arange(ROWS)}, index=[f"c{row}" for row in range(ROWS)])
    features = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    key = "X_cellpatch"
    with EmbeddingWriter(
        output, {}, ROWS, {key: WIDTH}, np.dtype("float32"), overwrite=True
    ) as writer:
        writer.prepare(lambda root: write_obs(root, [FrameTable(obs)], ["one"]))
        for shard in writer.missing:
            writer.write(shard, {key: features[slice(*writer.bounds(shard))]}, {})
        writer.add_columns({"label": np.arange(ROWS)})
        writer.finish()


def write_tokens(output: Path) -> None:
    write_store(output, make_cells([3, 0, 41, 11, 2, 30, 17]), ends=range(1, 8), overwrite=True)


@pytest.mark.parametrize("write", [write_embeddings, write_tokens])
def test_what_is_said_to_be_done_survives_a_power_cut(
    write: Callable[[Path], None], tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 5)
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 1)
    output = tmp_path / "new" / "out.zarr"
    for _ in range(2):  # the second one replaces the first
        write(output)
        assert disk.finds(output, tmp_path)
        assert disk.lost(output) == []
        assert not partial_of(output).exists()
