"""The token store: opened if all of it is there and fits together, else refused with advice."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

from cellpatch_fast.config import Preprocessing
from cellpatch_fast.errors import InputError
from cellpatch_fast.io import TokenStore
from cellpatch_fast.io.interfaces import ChunkError
from cellpatch_fast.io.stores.partial import partial_of
from cellpatch_fast.io.stores.tokens import ATTRIBUTE, is_token_store

from .token_files import (
    CONTINUOUS,
    VOCABULARY,
    append,
    make_cells,
    make_obs,
    open_writer,
    read_chunks,
    write_store,
)

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr")

CELLS = make_cells([3, 0, 41, 11, 2])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "tokens.zarr"
    write_store(path, CELLS)
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    """A token store that may be damaged."""
    return Path(shutil.copytree(template, tmp_path / "tokens.zarr"))


def refusal(path: str | Path) -> str:
    with pytest.raises(InputError) as caught, TokenStore(path):
        pass
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1
    return message


def change_facts(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the root's attribute."""
    metadata = json.loads((path / "zarr.json").read_text())
    change(metadata["attributes"][ATTRIBUTE])
    (path / "zarr.json").write_text(json.dumps(metadata))


def replace_array(path: Path, key: str, values: np.ndarray) -> None:
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    del root[key]
    root.create_array(key, data=values, config={"write_empty_chunks": True})
    zarr.consolidate_metadata(path)


def test_what_a_store_says_of_itself(path: Path) -> None:
    with TokenStore(str(path)) as store:
        assert store.name == str(path)
        assert (store.n_cells, store.entries) == (5, 57)
        assert store.offsets.tolist() == [0, 3, 3, 44, 55, 57]
        assert store.offsets.dtype == np.int64
        assert store.genes.dtype == np.uint16
        assert store.values.dtype == np.uint8
        assert store.vocabulary_fingerprint == VOCABULARY.fingerprint
        assert store.vocabulary_size == 62
        assert store.preprocessing == Preprocessing()
        assert store.inputs == ["one.h5ad"]
        assert store.counts == {"entries": 57, "unknown_entries": 10, "empty_cells": 1}
        assert store.shuffled is None
        assert store.measured().dtype == bool
        assert np.array_equal(store.measured(), [np.arange(62) % 2 == 1])
        pd.testing.assert_frame_equal(store.read_obs(), make_obs(5))
        table = store.obs_table()
        assert (len(table), table.columns) == (5, ["n"])
        facts = store.describe()
    wanted = {"cells": 5, "entries": 57, "unknown_entries": 10, "layer": "counts", "shuffled": "no"}
    assert wanted.items() <= facts.items()
    assert is_token_store(path)


def test_continuous_store(tmp_path: Path) -> None:
    path = tmp_path / "continuous.zarr"
    write_store(path, make_cells([3, 5], CONTINUOUS), CONTINUOUS, shuffled=7)
    with TokenStore(path) as store:
        assert store.values.dtype == np.float16
        assert store.preprocessing == CONTINUOUS
        assert store.shuffled == 7
        assert store.describe()["shuffled"] == "with seed 7"


def test_store_from_a_zip_file(path: Path) -> None:
    zipped = Path(shutil.make_archive(str(path), "zip", path))
    with TokenStore(zipped) as store, TokenStore(path) as unzipped:
        assert np.array_equal(read_chunks(store.genes), CELLS.genes.numpy())
        assert store.fingerprint() == unzipped.fingerprint()


def test_store_behind_an_address(path: Path) -> None:
    pytest.importorskip("fsspec")
    with TokenStore(path.as_uri()) as store, TokenStore(path) as local:
        assert store.name == path.as_uri()
        assert np.array_equal(read_chunks(store.genes), CELLS.genes.numpy())
        assert np.array_equal(store.measured(), local.measured())
        pd.testing.assert_frame_equal(store.read_obs(), local.read_obs())
        assert store.fingerprint() == local.fingerprint()
    assert is_token_store(path.as_uri())
    zarr.open_group(path.with_name("other.zarr"), mode="w", zarr_format=3)
    assert not is_token_store(path.with_name("other.zarr").as_uri())


def test_obs_is_read_by_anndata_too(path: Path) -> None:
    obs = anndata.io.read_elem(zarr.open_group(path, mode="r")["obs"])
    pd.testing.assert_frame_equal(obs, make_obs(5))


def test_fingerprint_tells_stores_apart(path: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        with TokenStore(path) as store:
            return store.fingerprint()

    other = tmp_path / "other.zarr"
    write_store(other, CELLS)
    assert fingerprint(other) == fingerprint(path)
    write_store(other, CELLS, settings={"layer": "X"}, overwrite=True)
    assert fingerprint(other) != fingerprint(path)


@pytest.mark.filterwarnings("always")
def test_opening_warns_of_nothing(path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught, TokenStore(path) as store:
        read_chunks(store.genes)
        store.read_obs()
    assert not [warning for warning in caught if warning.category is not ResourceWarning]


def test_store_of_format_version_1_is_read(path: Path) -> None:
    """It was written before there were checksums."""
    old = Path(__file__).parents[2] / "data" / "token-store-1.zip"
    with TokenStore(old) as store, TokenStore(path) as new:
        assert np.array_equal(read_chunks(store.genes), CELLS.genes.numpy())
        assert np.array_equal(read_chunks(store.values), CELLS.values.numpy())
        assert np.array_equal(store.offsets, CELLS.offsets.numpy())
        assert np.array_equal(store.measured(), new.measured())
        assert store.counts == new.counts


@pytest.mark.parametrize(
    ("found", "named"), [(3, "3"), (0, "0"), ("1", "'1'"), (None, "None"), (True, "True")]
)
def test_other_format_version(path: Path, found: Any, named: str) -> None:
    change_facts(path, lambda facts: facts.update(format_version=found, version="7.1.0"))
    message = refusal(path)
    assert f"token store format version {named} is not supported" in message
    assert "written by cellpatch-fast 7.1.0" in message
    assert "install a newer cellpatch-fast" in message
    assert is_token_store(path)


def test_unfinished_store(tmp_path: Path) -> None:
    """By its own name and by the one that it will have."""
    output = tmp_path / "tokens.zarr"
    with open_writer(output, len(CELLS)) as writer:
        append(writer, CELLS, [2])
    for path in (output, partial_of(output)):
        message = refusal(path)
        assert f"{partial_of(output)} is an unfinished token store" in message
        assert "repeat that command" in message
        assert is_token_store(path)


def test_an_old_store_can_be_read_while_a_new_one_is_made(path: Path) -> None:
    with open_writer(path, 3, overwrite=True), TokenStore(path) as store:
        assert store.n_cells == 5


def test_what_is_no_token_store(tmp_path: Path, path: Path) -> None:
    zarr.open_group(tmp_path / "group.zarr", mode="w", zarr_format=3)
    zarr.open_group(tmp_path / "v2.zarr", mode="w", zarr_format=2)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no zip")
    for name, message in (
        ("nothing.zarr", "no such file or folder"),
        ("group.zarr", "is no token store. Expected a token store, as cellpatch tokenize makes it"),
        ("v2.zarr", "is a folder, but no Zarr v3 store"),
        ("folder", "is a folder, but no Zarr v3 store"),
        ("file", "cannot read the Zarr store"),
    ):
        assert message in refusal(tmp_path / name)
        assert not is_token_store(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("vocabulary"),
        lambda facts: facts["vocabulary"].pop("size"),
        lambda facts: facts.update(preprocessing={"value_rounding": "up"}),
        lambda facts: facts.update(preprocessing={"bins": 6}),
        lambda facts: facts.update(inputs=3),
        lambda facts: facts.update(counts=[]),
        lambda facts: facts.update(shuffled="yes"),
        lambda facts: facts.pop("settings"),
    ],
)
def test_damaged_metadata(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    change_facts(path, change)
    assert f"its attribute {ATTRIBUTE} is damaged" in refusal(path)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("offsets", np.arange(5), "offsets end at 4, but there are 57 genes and 57 values"),
        ("offsets", np.array([0, 3, 3, 57]), "offsets describe 3 cells, obs 5"),
        ("offsets", np.array([0, 3, 2, 44, 55, 57]), "offsets decrease after cell 1"),
        ("offsets", np.array([1, 3, 3, 44, 55, 57]), "offsets start at 1, not at 0"),
        ("offsets", np.array([], np.int64), "offsets start at nothing, not at 0"),
        ("offsets", np.array([0, 57], np.int32), "offsets is int32"),
        ("genes", np.zeros(57, np.uint32), "genes is uint32 of shape (57,); expected uint16"),
        ("genes", np.ones((57, 1), np.uint16), "genes is uint16 of shape (57, 1)"),
        ("values", np.ones(56, np.uint8), "but there are 57 genes and 56 values"),
        ("values", np.ones(57, np.float16), "values is float16 of shape (57,); expected uint8"),
    ],
)
def test_arrays_that_do_not_fit_together(
    path: Path, key: str, values: np.ndarray, message: str
) -> None:
    replace_array(path, key, values)
    assert message in refusal(path)


def test_measured_of_another_shape(path: Path) -> None:
    replace_array(path, "measured", np.ones((2, 62), np.uint8))
    with TokenStore(path) as store, pytest.raises(InputError, match=r"shape \(2, 62\), but .* 1 i"):
        store.measured()


@pytest.mark.parametrize("key", ["genes", "values", "offsets"])
def test_missing_chunk(path: Path, key: str) -> None:
    (path / key / "c" / "0").unlink()
    assert f"missing chunks of {key}: 1 (the first is 'c/0')" in refusal(path)


def test_missing_array(path: Path) -> None:
    shutil.rmtree(path / "values")
    assert refusal(path)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_shard_is_found_by_reading(path: Path, damage: str) -> None:
    shard = path / "genes" / "c" / "1"
    content = shard.read_bytes()
    changed = content[:-9] + bytes([content[-9] ^ 255]) + content[-8:]  # in the index
    shard.write_bytes(content[:-11] if damage == "cut" else changed)
    with TokenStore(path) as store, pytest.raises(ChunkError, match="genes"):
        read_chunks(store.genes)
