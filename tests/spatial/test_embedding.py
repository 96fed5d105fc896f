"""An embedding of a tissue: equal bits, whatever interrupts it; tiles and disk change nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

from cellpatch_fast import CellPatch
from cellpatch_fast.config import Reading
from cellpatch_fast.errors import InputError
from cellpatch_fast.spatial import embedding as embedding_module
from cellpatch_fast.spatial.embedding import SpatialEmbedding, embed_tissue
from cellpatch_fast.spatial.fitting import Fit
from cellpatch_fast.spatial.graphs import SpatialGraph, spatial_graph
from cellpatch_fast.spatial.pieces import PieceFiles
from cellpatch_fast.spatial.settings import PRESETS, SpatialSettings

from ..training.conftest import untimed
from .conftest import GENES, SMALL, SPOTS, small

each_preset = pytest.mark.parametrize("preset", list(PRESETS))


def embed(
    data: Any, graph: SpatialGraph, places: np.ndarray, model: CellPatch | None = None,
    *, preset: str = "default", settings: dict[str, Any] | None = None, **options: Any,
) -> SpatialEmbedding:  # fmt: skip
    """By a small network."""
    chosen = small(preset, **settings or {})
    return embed_tissue(data, places, graph, model, settings=chosen, **options)


def same(one: SpatialEmbedding, other: SpatialEmbedding) -> bool:
    return np.array_equal(one.rows, other.rows) and one.losses == other.losses


@each_preset
def test_each_preset_learns_and_has_equal_bits_twice(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch, preset: str
) -> None:
    settings = {"epochs": 9, "learning_rate": 1e-2}
    one, two = (
        embed(tissue, graph, places, tissue_model, preset=preset, settings=settings)
        for _ in range(2)
    )
    assert one.rows.shape == (SPOTS, SMALL["output"])
    assert one.rows.dtype == np.float32
    assert len(one.losses) == 9
    assert one.losses[-1] < 0.9 * one.losses[0]
    assert same(one, two)
    other = embed(
        tissue, graph, places, tissue_model, preset=preset, settings=settings | {"seed": 1}
    )
    assert not np.allclose(one.rows, other.rows, atol=1e-3)


def test_without_a_model_it_is_stagate_alone(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch
) -> None:
    alone = embed(tissue, graph, places)
    assert len(alone.genes) == GENES
    assert alone.params["model"] is None
    assert not np.allclose(alone.rows, embed(tissue, graph, places, tissue_model).rows, atol=1e-3)


def test_the_aliased_decoder_of_the_published_code_learns_too(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray
) -> None:
    one, two = (embed(tissue, graph, places, settings={"tie": "alias"}) for _ in range(2))
    assert same(one, two)
    assert one.losses[-1] < one.losses[0]
    assert one.losses[1:] != embed(tissue, graph, places).losses[1:]


def test_the_callers_random_numbers_go_on(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray
) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    embed(tissue, graph, places)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_is_not_changed(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in tissue_model.state_dict().items()}
    embed(tissue, graph, places, tissue_model, preset="paper")
    after = tissue_model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not tissue_model.training


# --- tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "paper", "original-code"])
@pytest.mark.parametrize("tile_spots", [17, 64])
def test_tiles_change_the_result_by_rounding_only(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch,
    preset: str, tile_spots: int,
) -> None:  # fmt: skip
    if preset != "default":  # what dropout drops is another thing in every piece
        config = tissue_model.config
        tissue_model = CellPatch(
            type(config)(**{**_fields(config), "attention_dropout": 0.0}), tissue_model.vocabulary
        )
    whole = embed(tissue, graph, places, tissue_model, preset=preset)
    tiles = embed(tissue, graph, places, tissue_model, preset=preset, tile_spots=tile_spots)
    assert tiles.params["tiles"] > 1
    assert whole.params["tiles"] == 1
    np.testing.assert_allclose(tiles.losses, whole.losses, rtol=1e-5)
    np.testing.assert_allclose(tiles.rows, whole.rows, atol=1e-3 * np.abs(whole.rows).max())


def _fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "format_version"}


def test_a_tissue_beyond_memory_gives_the_bits_of_one_in_memory(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "tissue.h5ad"
    tissue.write_h5ad(path)
    options: dict[str, Any] = {"settings": {"variable_genes": 23}, "tile_spots": 37}
    expected = embed(tissue, graph, places, tissue_model, **options)
    assert same(embed(path, graph, places, tissue_model, **options), expected)
    monkeypatch.setattr(embedding_module, "WHOLE_SPOTS", SPOTS - 1)
    monkeypatch.setattr(embedding_module, "MEMORY", 1_000)
    folders: list[Path] = []

    class Files(PieceFiles):
        def __init__(self, folder: Path) -> None:
            folders.append(folder)
            super().__init__(folder)

    monkeypatch.setattr(embedding_module, "PieceFiles", Files)
    assert same(embed(path, graph, places, tissue_model, **options), expected)
    assert len(folders) == 1
    assert not folders[0].exists()  # nothing stays behind


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("interrupted_at", [1, 4])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, interrupted_at: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("cellpatch_fast.spatial.fitting.CHECKPOINT_SECONDS", -1)

    def run(name: str) -> SpatialEmbedding:
        return embed(tissue, graph, places, tissue_model, preset=preset, folder=tmp_path / name)

    whole = run("whole")
    step = Fit.step

    def interrupted(self: Fit, pieces: Any) -> float:
        if len(self.losses) == interrupted_at:
            raise KeyboardInterrupt
        return step(self, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "step", interrupted)
        for _ in range(2):  # the second time the moment it goes on
            with pytest.raises(KeyboardInterrupt):
                run("part")
    assert same(run("part"), whole)
    assert untimed(tmp_path / "part" / "epochs.csv") == untimed(tmp_path / "whole" / "epochs.csv")
    assert same(run("part"), whole)  # finished: nothing to do


@pytest.mark.skipif(sys.platform != "linux", reason="needs kill -9")
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    epochs = 100
    settings = {"epochs": epochs}
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    tissue_model.save_pretrained(tmp_path / "model")
    whole = embed(tissue, graph, places, tissue_model, settings=settings)
    program = f"""
        import torch
        from anndata import read_h5ad
        from cellpatch_fast import CellPatch
        from cellpatch_fast.spatial import embedding, fitting, graphs, settings

        torch.set_num_threads({torch.get_num_threads()})
        fitting.CHECKPOINT_SECONDS = -1
        tissue = read_h5ad("tissue.h5ad")
        places = tissue.obsm["spatial"]
        embedding.embed_tissue(
            tissue, places, graphs.spatial_graph(places), CellPatch.from_pretrained("model"),
            settings=settings.SpatialSettings(**{SMALL | settings}), folder=embedding.Path("run"),
        )
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path)
    table = tmp_path / "run" / "epochs.csv"
    while process.poll() is None and not (table.exists() and table.read_bytes().count(b"\n") > 9):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = table.read_bytes().count(b"\n") - 1
    assert 8 <= done < epochs
    resumed = embed(
        tissue, graph, places, CellPatch.from_pretrained(tmp_path / "model"),
        settings=settings, folder=tmp_path / "run",
    )  # fmt: skip
    assert same(resumed, whole)


def test_a_finished_run_can_be_made_longer_but_not_shorter(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tmp_path: Path
) -> None:
    long = embed(tissue, graph, places, settings={"epochs": 8})
    embed(tissue, graph, places, settings={"epochs": 5}, folder=tmp_path / "run")
    longer = embed(tissue, graph, places, settings={"epochs": 8}, folder=tmp_path / "run")
    assert same(longer, long)
    with pytest.raises(InputError, match=r"8 epochs are done, more than epochs=5.*overwrite"):
        embed(tissue, graph, places, settings={"epochs": 5}, folder=tmp_path / "run")
    short = embed(
        tissue, graph, places, settings={"epochs": 5}, folder=tmp_path / "run", overwrite=True
    )
    assert short.losses == long.losses[:5]


def test_another_run_is_not_gone_on_with(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    tissue.layers["half"] = (tissue.X / 2).ceil()
    embed(tissue, graph, places, tissue_model, folder=folder)
    changed = tissue.copy()
    changed.X = tissue.X[::-1].copy()
    other = CellPatch(tissue_model.config, tissue_model.vocabulary)
    nearest = spatial_graph(places, kind="nearest")
    usual = (tissue, graph, places, tissue_model)
    refusals: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("seed: was 0, is now 1", usual, {"settings": {"seed": 1}}),
        ("hidden: was 13, is now 11", usual, {"settings": {"hidden": 11}}),
        ("dense: was False, is now True", usual, {"preset": "paper"}),
        ("model: ", (tissue, graph, places, other), {}),
        ("model: ", (tissue, graph, places), {}),
        ("tiles: was 1, is now 2", usual, {"tile_spots": 64}),
        ("graph: .*edges", (tissue, nearest, places, tissue_model), {}),
        ("layer: was None, is now 'half'", usual, {"reading": Reading(layer="half")}),
        ("content: ", (changed, graph, places, tissue_model), {}),
    ]
    kept = (folder / "checkpoint.pt").read_bytes()
    for message, arguments, options in refusals:
        with pytest.raises(InputError, match=f"(?s)holds a run with other settings.*{message}"):
            embed(*arguments, folder=folder, **options)
    assert (folder / "checkpoint.pt").read_bytes() == kept


def test_a_checkpoint_that_does_not_fit_is_refused(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tmp_path: Path
) -> None:
    embed(tissue, graph, places, folder=tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["0.hidden_weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="checkpoint of this run does not fit its network"):
        embed(tissue, graph, places, folder=tmp_path / "run")


def test_the_folder_says_what_the_result_depends_on(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tmp_path: Path
) -> None:
    embed(tissue, graph, places, folder=tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "training.json").read_text())
    assert facts["kind"] == "spatial"
    assert facts["settings"]["graph"] == graph.params() | {"edges": graph.distances.nnz}
    assert facts["settings"]["spots"] == SPOTS


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "original-code"])
def test_presets_that_train_a_model_need_one(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, preset: str
) -> None:
    with pytest.raises(InputError, match="but there is no model: name one, or use the preset 'de"):
        embed(tissue, graph, places, preset=preset)


def test_a_graph_of_other_spots_is_refused(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray
) -> None:
    with pytest.raises(InputError, match="the graph has 110 spots, but the data 97"):
        embed(tissue[:97].copy(), graph, places)


def test_a_loss_that_is_not_finite_ends_the_run(
    tissue: AnnData, graph: SpatialGraph, places: np.ndarray, tissue_model: CellPatch
) -> None:
    features = np.full((SPOTS, 3), 1e30, np.float32)
    with pytest.raises(InputError, match=r"the loss is .* in epoch 1: .* learning_rate often help"):
        embed(tissue, graph, places, features=features)


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("best", {}, "unknown preset 'best': choose default, paper, original-code"),
        ("default", {"epoch": 3}, "unknown settings: epoch"),
        ("default", {"epochs": 0}, "epochs must be at least 1, found 0"),
        ("default", {"epochs": 2.5}, "epochs must be a whole number, found 2.5"),
        ("default", {"seed": -1}, "seed must be not negative"),
        ("default", {"learning_rate": float("nan")}, "learning_rate must be positive and finite"),
        ("default", {"target_sum": 0}, "target_sum must be positive"),
        ("default", {"weight_decay": float("inf")}, "weight_decay must be not negative and finite"),
        ("default", {"tie": "none"}, "tie must be true or alias, found 'none'"),
        ("default", {"features": "thawed"}, "features must be frozen or trained"),
        ("default", {"expression": False}, "features alone as input need a dense layer"),
        ("paper", {"components": 30}, "trained features are not reduced"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    preset: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SpatialSettings.preset(preset, **changes)
