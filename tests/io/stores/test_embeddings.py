"""The embedding store: complete or not there, resumable after any step, never deletes what is not
its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

from cellpatch_fast.errors import InputError
from cellpatch_fast.io.sources.tables import FrameTable
from cellpatch_fast.io.stores import embeddings, partial
from cellpatch_fast.io.stores.embeddings import ATTRIBUTE, EmbeddingWriter, shard_rows
from cellpatch_fast.io.stores.obs import write_obs
from cellpatch_fast.io.stores.partial import (
    JOURNAL,
    LOCK,
    REPLACED,
    finished_facts,
    is_taken,
    partial_of,
    tidy,
    unfinished_facts,
)

from ...conftest import tree

ROWS, WIDTH, KEY = 53, 11, "X_cellpatch"
SETTINGS = {"model": "abc", "inputs": ["one", "two"], "use_raw": False}
OBS = pd.DataFrame({"n": np.arange(ROWS)}, index=[f"c{n}" for n in range(ROWS)])
EMBEDDING = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 10 rows in chunks of 5: the last has 3 rows."""
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 5)
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 10 * WIDTH * 4)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.zarr"


def open_writer(output: Path, overwrite: bool = False, **changes: Any) -> EmbeddingWriter:
    return EmbeddingWriter(
        output, SETTINGS | changes, ROWS, {KEY: WIDTH}, np.dtype("float32"), overwrite=overwrite
    )


def prepare(writer: EmbeddingWriter) -> None:
    writer.prepare(lambda root: write_obs(root, [FrameTable(OBS)], ["one"]))


def write(writer: EmbeddingWriter, shards: list[int] | None = None) -> None:
    for shard in writer.missing if shards is None else shards:
        rows = EMBEDDING[slice(*writer.bounds(shard))]
        writer.write(shard, {KEY: rows}, {"unknown_entries": shard, "empty_cells": 1})


def make(output: Path, overwrite: bool = False, **changes: Any) -> dict[str, int]:
    """A whole run, or the rest of one."""
    with open_writer(output, overwrite, **changes) as writer:
        prepare(writer)
        write(writer)
        return writer.finish()


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    make(tmp_path / "uninterrupted.zarr")
    return tree(tmp_path / "uninterrupted.zarr")


def test_store_is_a_valid_anndata_object(output: Path) -> None:
    assert make(output) == {"unknown_entries": 15, "empty_cells": 6}
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    adata = anndata.read_zarr(output)
    assert adata.shape == (ROWS, 0)
    assert np.array_equal(adata.obsm[KEY], EMBEDDING)
    pd.testing.assert_frame_equal(adata.obs, OBS)
    params = adata.uns[KEY]["params"]
    assert params["model"] == "abc"
    assert list(params["inputs"]) == ["one", "two"]
    facts = finished_facts(output, ATTRIBUTE)
    assert facts is not None
    assert facts["settings"] == SETTINGS
    assert facts["counts"] == {"unknown_entries": 15, "empty_cells": 6}


def test_embedding_lies_in_shards_of_whole_chunks(output: Path) -> None:
    make(output)
    array = zarr.open_array(output / "obsm" / KEY)
    assert (array.shards, array.chunks) == ((10, WIDTH), (5, WIDTH))
    assert len(list((output / "obsm" / KEY / "c").iterdir())) == 6


@pytest.mark.parametrize(
    ("width", "dtype", "rows"),
    [
        pytest.param(640, "float32", 25 * 1024, id="flattened"),
        pytest.param(640, "float16", 51 * 1024, id="flattened-half"),
        pytest.param(10, "float16", 128 * 1024, id="mean: no more than seconds of work"),
        pytest.param(10**6, "float32", 1024, id="one chunk at least"),
    ],
)
def test_shards_at_full_size(
    width: int, dtype: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert shard_rows(width, np.dtype(dtype)) == rows


def test_nothing_is_called_finished_before_it_is(output: Path) -> None:
    with open_writer(output) as writer:
        with pytest.raises(ValueError, match="not complete"):
            writer.finish()
        prepare(writer)
        write(writer, [0, 1, 2, 3, 4])
        with pytest.raises(ValueError, match="not complete"):
            writer.finish()
        with pytest.raises(ValueError, match="shard 5 of X_cellpatch is 3 x 11"):
            writer.write(5, {KEY: EMBEDDING[:4]}, {})
    assert not output.exists()


@pytest.mark.parametrize("done", [[], [0], [0, 1, 2, 3, 4, 5], [1, 4]])
def test_run_goes_on_where_it_stopped(
    output: Path, expected: dict[str, bytes], done: list[int]
) -> None:
    with open_writer(output) as writer:
        prepare(writer)
        write(writer, done)
    with open_writer(output) as writer:
        assert writer.missing == [shard for shard in range(6) if shard not in done]
        assert writer.rows_done == sum(3 if shard == 5 else 10 for shard in done)
        prepare(writer)
        write(writer)
        assert writer.finish() == {"unknown_entries": 15, "empty_cells": 6}
    assert tree(output) == expected
    assert not partial_of(output).exists()


def test_shard_that_is_gone_or_cut_is_computed_again(
    output: Path, expected: dict[str, bytes]
) -> None:
    with open_writer(output) as writer:
        prepare(writer)
        write(writer, [0, 1, 2, 3])
        shards = writer.store / "obsm" / KEY / "c"
    (shards / "1" / "0").unlink()
    (shards / "2" / "0").write_bytes((shards / "2" / "0").read_bytes()[:-1])
    (shards / "4").mkdir()
    (shards / "4" / "0.5f.partial").write_text("half-written")
    with open_writer(output) as writer:
        assert writer.missing == [1, 2, 4, 5]
    make(output)
    assert tree(output) == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "abd"}, "\n  model: was 'abc', is now 'abd'"),
        ({"inputs": ["one"]}, "\n  inputs: was ['one', 'two'], is now ['one']"),
        ({"new": 1}, "\n  new: was 'not set', is now 1"),
    ],
)
def test_other_settings_do_not_continue(output: Path, changes: dict[str, Any], named: str) -> None:
    open_writer(output).close()
    with pytest.raises(InputError) as caught:
        open_writer(output, **changes)
    assert str(caught.value).startswith(f"{partial_of(output)} holds the unfinished work")
    assert str(caught.value).endswith(named)
    make(output)  # and what was begun can still be finished


def test_other_version_does_not_continue(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_writer(output).close()
    monkeypatch.setattr(partial, "version", lambda _: "99.1.0")
    with pytest.raises(InputError, match=r"version of cellpatch-fast: was .*, is now '99.1.0'"):
        open_writer(output)


def test_overwriting_drops_unfinished_work_of_other_settings(
    output: Path, expected: dict[str, bytes]
) -> None:
    with open_writer(output, model="other") as writer:
        prepare(writer)
        write(writer, [0])
    with open_writer(output, overwrite=True) as writer:
        assert writer.missing == list(range(6))
    make(output, overwrite=True)
    assert tree(output) == expected


def test_overwriting_goes_on_with_its_own_unfinished_work(output: Path) -> None:
    """The same command with --overwrite, repeated after a kill, must come to an end."""
    make(output, model="old")
    with open_writer(output, overwrite=True) as writer:
        prepare(writer)
        write(writer, [0, 1])
    with open_writer(output, overwrite=True) as writer:
        assert writer.missing == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format_version": 1}', '{"format_version": "one"}', "null"],
)
def test_damaged_journal(output: Path, content: str) -> None:
    open_writer(output).close()
    (partial_of(output) / JOURNAL).write_text(content)
    with pytest.raises(InputError, match=f"{JOURNAL} is damaged .*start anew"):
        open_writer(output)
    make(output, overwrite=True)


def test_journal_of_a_newer_version(output: Path) -> None:
    open_writer(output).close()
    journal = partial_of(output) / JOURNAL
    newer = json.loads(journal.read_text()) | {"format_version": 3, "version": "7.0.0"}
    journal.write_text(json.dumps(newer))
    with pytest.raises(InputError, match=r"begun by a newer cellpatch-fast \(7\.0\.0; this is"):
        unfinished_facts(partial_of(output))


def test_damaged_unfinished_store(output: Path) -> None:
    with open_writer(output) as writer:
        prepare(writer)
    (partial_of(output) / "store/obsm" / KEY / "zarr.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read the unfinished store .*start anew"):
        open_writer(output)


def test_second_writer_is_refused(output: Path) -> None:
    with open_writer(output):
        for overwrite in (False, True):
            with pytest.raises(InputError, match="another process is writing there"):
                open_writer(output, overwrite)
    open_writer(output).close()


def test_file_system_without_locks(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    make(output)
    assert "cannot be locked (No locks available)" in caplog.text


def test_store_that_another_process_has_just_made_is_not_replaced(output: Path) -> None:
    make(output)
    with pytest.raises(InputError, match="another process has just made it"):
        open_writer(output)


def test_folder_of_someone_else_is_not_used(output: Path) -> None:
    partial_of(output).mkdir()
    (partial_of(output) / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds thesis\.tex, so it is no unfinished"):
            open_writer(output, overwrite)
    assert (partial_of(output) / "thesis.tex").exists()


def test_empty_folder_may_become_the_output(output: Path, expected: dict[str, bytes]) -> None:
    output.mkdir()
    assert not is_taken(output)
    make(output)
    assert tree(output) == expected


def test_tidy_leaves_what_is_in_work(output: Path) -> None:
    with open_writer(output) as writer:  # no store yet: as after the last step, but locked
        tidy(output)
        assert (writer.partial / LOCK).exists()
        prepare(writer)
    tidy(output)
    assert (writer.partial / JOURNAL).exists()
    tidy(output.with_name("nothing.zarr"))


def test_old_store_comes_back_if_its_replacement_was_cut_short(output: Path) -> None:
    make(output, model="old")
    before = tree(output)
    open_writer(output, overwrite=True).close()
    os.rename(output, partial_of(output) / REPLACED)  # killed here
    open_writer(output, overwrite=True).close()
    assert tree(output) == before


def test_kill_while_the_old_store_is_deleted_blocks_nothing(
    output: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(output, model="old")
    rmtree = shutil.rmtree

    def killed(folder: Path) -> None:
        if (folder / "zarr.json").exists():  # a store, of which half is deleted
            rmtree(folder / "obs")
            raise KeyboardInterrupt
        rmtree(folder)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            make(output, overwrite=True)
    assert tree(output) == expected
    make(output, overwrite=True)
    assert tree(output) == expected
    assert not partial_of(output).exists()


def test_what_is_no_store_has_no_facts(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    (tmp_path / "file").write_text("{}")
    for content in (
        "[]",
        "{",
        '{"attributes": {"cellpatch": 3}}',
        '{"attributes": {"cellpatch": {}}}',
    ):
        (tmp_path / "zarr.json").write_text(content)
        assert finished_facts(tmp_path, ATTRIBUTE) is None
    for name in ("other.zarr", "file", "nothing"):
        assert finished_facts(tmp_path / name, ATTRIBUTE) is None
        assert unfinished_facts(tmp_path / name) is None
