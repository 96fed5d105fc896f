"""Launch configurations: every shipped one is there, the nearest is taken, a tuned one wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

configuration = pytest.importorskip("cellpatch_fast.kernels.gpu.configuration")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 255, 256, 257, 5000.5, 70_000]


@pytest.fixture(autouse=True)
def tuned_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An empty one; what is loaded is forgotten before and after."""
    monkeypatch.setenv("CELLPATCH_CONFIGURATIONS", str(tmp_path))
    configuration.load.cache_clear()
    yield tmp_path
    configuration.load.cache_clear()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("architecture", configuration.ARCHITECTURES)
def test_every_architecture_type_and_length(architecture: int, dtype: torch.dtype) -> None:
    found = [configuration.configuration_for(architecture, dtype, length) for length in LENGTHS]
    assert {(one.tile, one.warps) for one in found} == {(found[0].tile, found[0].warps)}
    for one in found:
        assert one.tile in (16, 32, 64, 128, 256)
        assert one.warps in (1, 2, 4, 8)
        assert 1 <= one.stages <= 5


@pytest.mark.parametrize(
    ("architecture", "shipped"),
    [(80, 80), (86, 80), (87, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 100)],
)
def test_the_nearest_architecture_that_is_not_newer(architecture: int, shipped: int) -> None:
    assert configuration.shipped_for(architecture) == shipped
    for dtype in TYPES:
        found = configuration.configuration_for(architecture, dtype, 1000)
        assert found == configuration.configuration_for(shipped, dtype, 1000)


def tuned(tile: int) -> dict[str, Any]:
    buckets = [{"up_to": 100, "stages": 4}, {"up_to": None, "stages": 5}]
    settings = {"tile": tile, "warps": 8, "buckets": buckets}
    types = dict.fromkeys(configuration.TYPES.values(), settings)
    return {"format_version": 1, "types": types}


def test_a_tuned_file_wins(tuned_folder: Path) -> None:
    shipped = configuration.configuration_for(80, torch.float16, 101)
    configuration.load.cache_clear()
    (tuned_folder / "sm90.json").write_text(json.dumps(tuned(32)))
    assert configuration.configuration_for(90, torch.float16, 100) == (32, 8, 4)
    assert configuration.configuration_for(90, torch.float32, 100.5) == (32, 8, 5)
    assert configuration.configuration_for(80, torch.float16, 101) == shipped != (32, 8, 5)


def test_tuned_files_lie_in_the_user_s_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CELLPATCH_CONFIGURATIONS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configuration.tuned_folder() == tmp_path / "cellpatch_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert configuration.tuned_folder() == Path.home() / ".cache/cellpatch_fast"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param("[]", id="list"),
        pytest.param(json.dumps({**tuned(32), "format_version": 2}), id="newer"),
        pytest.param(json.dumps({"format_version": 1, "types": {}}), id="no_types"),
        pytest.param(json.dumps(tuned(32)).replace("null", "500"), id="no_bucket_for_long_cells"),
    ],
)
def test_a_tuned_file_that_is_none_is_named(tuned_folder: Path, content: str) -> None:
    path = tuned_folder / "sm90.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} is not a file of launch.*cellpatch tune"):
        configuration.configuration_for(90, torch.float16, 100)
