"""obs comes out of a store as it went in, by columns and ranges, and from several inputs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import read_elem

from cellpatch_fast.errors import InputError
from cellpatch_fast.io.sources.source import open_source
from cellpatch_fast.io.sources.tables import FrameTable, StoredTable, Table
from cellpatch_fast.io.stores import obs as obs_module
from cellpatch_fast.io.stores.obs import SOURCE_COLUMN, write_obs

from ..conftest import opened, write_plain

ROWS = 23


@pytest.fixture(autouse=True)
def _short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs_module, "ROWS", 5)


def frame(rows: int = ROWS, seed: int = 0) -> pd.DataFrame:
    """Every kind of column that anndata can store."""
    random = np.random.default_rng(seed)
    some = random.random(rows) < 0.3
    return pd.DataFrame(
        {
            "text": [f"µ{n}" for n in range(rows)],
            "kind": pd.Categorical(random.choice(["b", "a"], rows), ["b", "a", "unused"]),
            "stage": pd.Categorical.from_codes(random.integers(-1, 2, rows), ["x", "y"], True),
            "count": random.integers(0, 99, rows).astype(np.uint16),
            "depth": np.where(some, np.nan, random.random(rows)).astype(np.float32),
            "good": random.random(rows) < 0.5,
            "perhaps": pd.array([None if x else n for n, x in enumerate(some)], "Int32"),
            "truth": pd.array([None if x else True for x in some], "boolean"),
            "words": pd.array([None if x else "word" for x in some], "string"),
        },
        index=pd.Index([f"cell{seed}-{n}" for n in range(rows)], name="barcode"),
    )


def written(
    tables: Sequence[Table],
    path: Path,
    names: Sequence[str] = ("a", "b", "c"),
    rows: np.ndarray | None = None,
) -> pd.DataFrame:
    root = zarr.open_group(path / "out.zarr", mode="w", zarr_format=3)
    with anndata.settings.override(
        zarr_write_format=3, auto_shard_zarr_v3=False, allow_write_nullable_strings=True
    ):
        write_obs(root, tables, names[: len(tables)], rows)
    return read_elem(root["obs"])


def stored(path: Path, container: str, obs: pd.DataFrame) -> Path:
    adata = anndata.AnnData(np.ones((len(obs), 2), np.float32), obs=obs)
    with anndata.settings.override(allow_write_nullable_strings=True):
        return write_plain(adata, path, container)


def assert_same(after: pd.DataFrame, before: pd.DataFrame) -> None:
    """The same rows and types; of text, which has several types in pandas, the same values."""
    text = ["text", "words"]
    pd.testing.assert_frame_equal(after.drop(columns=text), before.drop(columns=text))
    assert list(after.columns) == list(before.columns)
    for column in text:
        assert after[column].isna().tolist() == before[column].isna().tolist()
        assert after[column].dropna().tolist() == before[column].dropna().tolist()


@pytest.mark.parametrize("container", ["h5ad", "zarr-v2", "zarr-v3"])
def test_a_stored_table_comes_out_as_it_went_in(tmp_path: Path, container: str) -> None:
    before = frame()
    with open_source(stored(tmp_path, container, before)) as source:
        table = source.obs_table()
        assert isinstance(table, StoredTable)
        assert [column for column in table.columns if table.is_text(column)] == ["text"]
        after = written([table], tmp_path)
        pd.testing.assert_frame_equal(after, source.read_obs())
    assert_same(after, before)


def test_a_table_in_memory_comes_out_as_it_went_in(tmp_path: Path) -> None:
    after = written([FrameTable(frame())], tmp_path)
    assert_same(after, frame())


@pytest.mark.parametrize("rows", [1, 4, 5, 6, 10])
def test_ranges_fill_whole_chunks(tmp_path: Path, rows: int) -> None:
    obs = frame(rows)[["text"]]
    for count in (1, 3):
        after = written([FrameTable(obs)] * count, tmp_path)
        assert after["text"].tolist() == obs["text"].tolist() * count
        assert after.index.tolist() == obs.index.tolist() * count


def test_text_is_read_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of strings of ten million cells takes a gigabyte."""
    asked = []
    texts = StoredTable.texts

    def counted(table: StoredTable, column: str, start: int, stop: int) -> np.ndarray:
        asked.append((column, stop - start))
        return texts(table, column, start, stop)

    monkeypatch.setattr(StoredTable, "texts", counted)
    with open_source(stored(tmp_path, "h5ad", frame())) as source:
        written([source.obs_table()], tmp_path)
    assert {column for column, _ in asked} == {"barcode", "text"}
    assert max(rows for _, rows in asked) == 5


def test_rows_of_several_inputs_follow_each_other(tmp_path: Path) -> None:
    """As `anndata.concat` has them, column by column."""
    frames = [
        frame(7, 1),
        frame(11, 2).drop(columns=["count", "good", "depth", "text", "kind"]),
        frame(3, 3)[["kind", "text", "count"]].rename(columns={"count": "late"}),
    ]
    after = written([FrameTable(table) for table in frames], tmp_path)
    assert after[SOURCE_COLUMN].tolist() == ["a"] * 7 + ["b"] * 11 + ["c"] * 3
    expected = pd.concat(frames, join="outer")
    assert list(after.columns) == [*expected.columns, SOURCE_COLUMN]
    assert after.index.tolist() == expected.index.tolist()
    assert after.index.name == "barcode"
    for column in expected:
        missing = expected[column].isna().to_numpy()
        assert (after[column].isna() == missing).all(), column
        there = expected[column][~missing].tolist()
        assert after[column][~missing].tolist() == pytest.approx(there), column
    kinds = {column: str(after[column].dtype) for column in expected}
    assert kinds["count"] == "UInt16"
    assert kinds["good"] == "boolean"
    assert kinds["depth"] == "float32"
    assert kinds["kind"] == kinds["text"] == "category"
    assert after["stage"].cat.ordered


@pytest.mark.parametrize("sorted_rows", [1, 7, 100])
def test_rows_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sorted_rows: int
) -> None:
    """Every kind of column; row ``r`` goes to ``rows[r]``."""
    monkeypatch.setattr(obs_module, "SORTED_ROWS", sorted_rows)
    tables = [FrameTable(frame(7, 1)), FrameTable(frame(11, 2).drop(columns=["count", "kind"]))]
    for chosen in (tables[:1], tables):
        before = written(chosen, tmp_path)
        rows = np.random.default_rng(3).permutation(len(before))
        after = written(chosen, tmp_path, rows=rows)
        pd.testing.assert_frame_equal(after.iloc[rows], before)


def test_text_that_all_inputs_have_stays_text(tmp_path: Path) -> None:
    after = written([FrameTable(frame(7)), FrameTable(frame(3))], tmp_path)
    assert pd.api.types.is_string_dtype(after["text"])
    assert after["stage"].cat.ordered
    assert after["count"].dtype == np.uint16


def test_categories_of_several_inputs_are_united(tmp_path: Path) -> None:
    one = pd.DataFrame({"kind": pd.Categorical(["x", "y"])}, index=["a", "b"])
    two = pd.DataFrame({"kind": pd.Categorical(["z", "x"])}, index=["a", "b"])
    after = written([FrameTable(one), FrameTable(two)], tmp_path)
    assert after["kind"].tolist() == ["x", "y", "z", "x"]
    assert after["kind"].cat.categories.tolist() == ["x", "y", "z"]
    assert after.index.tolist() == ["a", "b", "a", "b"]


def test_different_types_become_text_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = pd.DataFrame({"batch": [1, 2], "day": pd.Categorical([3, 4])}, index=["a", "b"])
    two = pd.DataFrame({"batch": ["one", "two"], "day": ["five", "six"]}, index=["c", "d"])
    with caplog.at_level(logging.WARNING, "cellpatch_fast"):
        after = written([FrameTable(one), FrameTable(two)], tmp_path)
    assert after["batch"].tolist() == ["1", "2", "one", "two"]
    assert after["day"].tolist() == ["3", "4", "five", "six"]
    assert [message.split(" ", 1)[0] for message in caplog.messages] == [
        "obs['batch']",
        "obs['day']",
    ]


def test_an_earlier_source_column_is_replaced_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = [FrameTable(frame(2).assign(**{SOURCE_COLUMN: "old"}))] * 2
    with caplog.at_level(logging.WARNING, "cellpatch_fast"):
        after = written(tables, tmp_path)
    assert after[SOURCE_COLUMN].tolist() == ["a", "a", "b", "b"]
    assert f"obs['{SOURCE_COLUMN}'] of the inputs is replaced" in caplog.text


def test_index_names_that_differ_or_collide(tmp_path: Path) -> None:
    one, two = frame(2)[["count"]], frame(3)[["count"]].rename_axis("other")
    assert written([FrameTable(one), FrameTable(two)], tmp_path).index.name is None
    two = two.rename_axis("barcode").assign(text="t")
    three = frame(1).rename_axis("text")[["count"]]
    after = written([FrameTable(two), FrameTable(three)], tmp_path)
    assert after["text"].isna().tolist() == [False, False, False, True]


def consolidate(path: Path) -> None:
    """Let a changed Zarr store tell what it holds now."""
    if path.is_dir():
        zarr.consolidate_metadata(path)


@pytest.mark.parametrize("container", ["h5ad", "zarr-v3"])
@pytest.mark.parametrize("column", ["text", "kind"])
def test_damaged_column_is_named(tmp_path: Path, container: str, column: str) -> None:
    path = stored(tmp_path, container, frame())
    with opened(path) as root:
        del root["obs"][column if column == "text" else "kind/codes"]
    consolidate(path)
    with open_source(path) as source, pytest.raises(InputError) as caught:
        written([source.obs_table()], tmp_path)
    assert str(path) in str(caught.value)
    assert f"obs/{column}" in str(caught.value)


def test_column_of_another_length_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, "zarr-v3", frame())
    with opened(path) as root:
        del root["obs"]["depth"]
        anndata.io.write_elem(root["obs"], "depth", np.zeros(ROWS + 2))
    consolidate(path)
    with open_source(path) as source, pytest.raises(InputError, match="25 values for 23 rows"):
        written([source.obs_table()], tmp_path)


def test_names_of_columns_need_not_be_strings(tmp_path: Path) -> None:
    columns: dict[object, list[object]] = {0: [2, 3, 5], 1.5: ["x", "y", "z"], ("a", 7): [1, 2, 3]}
    numbered = pd.DataFrame(columns, index=["c1", "c2", "c3"])
    numbered.columns = pd.Index(list(columns), tupleize_cols=False)
    table = FrameTable(numbered)
    assert table.columns == ["0", "1.5", "('a', 7)"]
    assert table.is_text("1.5")
    assert not table.is_text("0")
    read = written([table], tmp_path)
    assert read["0"].tolist() == [2, 3, 5]
    assert read["1.5"].tolist() == ["x", "y", "z"]
    assert read["('a', 7)"].tolist() == [1, 2, 3]


def test_columns_of_one_name_are_refused() -> None:
    twice = pd.DataFrame([[1, 2, 3]], columns=["0", "kind", 0])
    with pytest.raises(InputError, match="obs has several columns called '0': rename or drop some"):
        FrameTable(twice)
