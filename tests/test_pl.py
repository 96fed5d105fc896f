"""Plots are really drawn: what is in them, that nothing is cut off, and what is left behind."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from cellpatch_fast import InputError, pl
from cellpatch_fast.plots.figures import GREY, OKABE_ITO

from .plots.drawn import LONG, assert_nothing_is_cut_off, confusion, panels

pytestmark = pytest.mark.usefixtures("nothing_is_left_to_pyplot")


# --- training curves -----------------------------------------------------------------------------

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """``write_run(metric...)``: the tables of a run of 7 epochs of 13 steps.

    Epoch 5 has the lowest loss, epoch 3 the best metrics.
    """

    def write(*metrics: str, epochs: int = 7, validation: bool = True) -> Path:
        steps = np.arange(1, 92)
        table = pd.DataFrame({"step": steps, "epoch": (steps + 12) // 13, "loss": 3 / steps})
        table.to_csv(tmp_path / "steps.csv", index=False)
        epoch = np.arange(1, epochs + 1)
        table = pd.DataFrame({"epoch": epoch, "step": 13 * epoch, "training_loss": 1 / epoch})
        table["validation_loss"] = (epoch - 5.0) ** 2 if validation else None
        for name in metrics:
            table[f"validation_{name}"] = 1 - abs(epoch - 3) / 8 if validation else None
        table.to_csv(tmp_path / "epochs.csv", index=False)
        return tmp_path

    return write


def test_no_epoch_is_marked_as_best_where_the_last_one_is_kept(write_run: WriteRun) -> None:
    run = write_run("accuracy", "macro_f1")
    (run / "training.json").write_text('{"settings": {"keep_best": false}}')
    for axes in panels(pl.training_curves(run)):
        assert not [line for line in axes.lines if str(line.get_label()).startswith("best")]


def test_training_curves_show_losses_metrics_and_the_best_epoch(write_run: WriteRun) -> None:
    figure = pl.training_curves(write_run("accuracy", "macro_f1"))
    losses, scores = panels(figure)
    lines = {str(line.get_label()): line for line in losses.lines}
    assert list(lines) == [
        *("step", "steps, smoothed"),
        *("training cells, by epoch", "validation cells, by epoch", "best epoch: 3"),
    ]
    assert lines["step"].get_ydata() == pytest.approx(3 / np.arange(1, 92))
    assert lines["validation cells, by epoch"].get_xdata()[-1] == 91
    assert lines["best epoch: 3"].get_xdata()[0] == 39
    assert [line.get_label() for line in scores.lines] == ["accuracy", "macro F1", "best epoch: 3"]
    assert_nothing_is_cut_off(figure)


def test_training_curves_without_validation_have_one_panel(write_run: WriteRun) -> None:
    (axes,) = panels(pl.training_curves(write_run("pearson", validation=False)))
    assert [line.get_label() for line in axes.lines][2:] == ["training cells, by epoch"]


def test_training_curves_of_a_run_in_its_first_epoch(write_run: WriteRun) -> None:
    (axes,) = panels(pl.training_curves(write_run("pearson", epochs=0)))
    assert [line.get_label() for line in axes.lines] == ["step", "steps, smoothed"]


def test_a_row_that_is_being_written_is_not_drawn(write_run: WriteRun) -> None:
    run = write_run()
    with (run / "steps.csv").open("a") as table:
        table.write("92,8")
    assert len(panels(pl.training_curves(run))[0].lines[0].get_xdata()) == 91


def test_training_curves_draw_losses_into_axes_of_the_user(write_run: WriteRun) -> None:
    mine = Figure()
    _, right = mine.subplots(1, 2)
    assert pl.training_curves(write_run("pearson"), ax=right) is mine
    assert [len(axes.lines) for axes in panels(mine)] == [0, 5]


def test_training_curves_of_what_is_no_run(tmp_path: Path, write_run: WriteRun) -> None:
    with pytest.raises(InputError, match=r"nowhere.steps\.csv is no table of a training run: .*No"):
        pl.training_curves(tmp_path / "nowhere")
    run = write_run()
    (run / "epochs.csv").write_text("epoch,step\n1,2\n")
    with pytest.raises(InputError, match=r"epochs\.csv .*lacks training_loss"):
        pl.training_curves(run)
    write_run()
    (run / "steps.csv").write_text("step,loss\n1,thesis\n")
    with pytest.raises(InputError, match=r"steps\.csv is no table .*thesis"):
        pl.training_curves(run)
    (run / "steps.csv").write_text("step,loss\n")
    with pytest.raises(InputError, match="no step to draw yet"):
        pl.training_curves(run)


# --- embedding -----------------------------------------------------------------------------------


def cells(classes: int, n: int = 211) -> anndata.AnnData:
    """Cells whose UMAP is there already; class i is a cluster, and the higher i the rarer."""
    random = np.random.default_rng(classes)
    kind = np.minimum(random.geometric(3 / (classes + 2), n) - 1, classes - 1)
    kind[:classes] = range(classes)
    names = np.array([f"{LONG} {i:02}" for i in range(classes)])
    rows = (random.normal(size=(classes, 5)) * 9)[kind] + random.normal(size=(n, 5))
    obs = pd.DataFrame(
        {
            "truth": pd.Categorical(names[kind], names[::-1]),
            "predicted": np.where(random.random(n) < 0.9, names[kind], "unknown"),
            "depth": random.random(n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    adata = anndata.AnnData(obs=obs, obsm={"X_cellpatch": rows, "X_umap": rows[:, :2]})
    adata.uns["neighbors"] = {"params": {"use_rep": "X_cellpatch"}}
    return adata


Colors = set[tuple[float, ...]]


def colors_of(adata: anndata.AnnData, figure: Figure, panel: int, column: str) -> dict[str, Colors]:
    """Which colours the cells of each class have in a panel, found by where they lie."""
    (points,) = panels(figure)[panel].collections
    drawn = zip(points.get_offsets(), points.get_facecolor(), strict=True)
    at = {tuple(place): color for place, color in drawn}
    found: dict[str, Colors] = {}
    for place, name in zip(adata.obsm["X_umap"], adata.obs[column], strict=True):
        found.setdefault(name, set()).add(tuple(at[tuple(place)][:3]))
    return found


@pytest.mark.parametrize("classes", [2, 8, 23, 61])
def test_a_class_has_one_colour_in_all_panels(classes: int) -> None:
    adata = cells(classes)
    figure = pl.embedding(adata, color=["truth", "predicted"])
    truth = colors_of(adata, figure, 0, "truth")
    predicted = colors_of(adata, figure, 1, "predicted")
    assert predicted.pop("unknown") == {to_rgb(GREY)}
    assert predicted.items() <= truth.items()
    assert len(set.union(*truth.values())) == len(truth) == classes
    if classes <= 8:
        assert set.union(*truth.values()) <= set(map(to_rgb, OKABE_ITO))
    (legend,) = figure.legends
    numbered = [f"{i}  " if classes > 8 else "" for i in range(1, classes + 1)]
    assert [text.get_text() for text in legend.get_texts()] == [
        *(f"{number}{LONG} {i:02}" for i, number in enumerate(numbered)),
        "unknown",
    ]
    if classes == 23:
        assert_nothing_is_cut_off(figure)


def test_more_than_8_classes_are_told_apart_by_numbers() -> None:
    for classes in (8, 11):
        axes = panels(pl.embedding(cells(classes), color="truth"))[0]
        written = [text.get_text() for text in axes.texts]
        assert written == [str(i) for i in range(1, 12) if classes > 8]


def test_rare_classes_are_drawn_over_common_ones_and_no_class_below() -> None:
    adata = cells(5)
    figure = pl.embedding(adata, color="predicted")
    (points,) = panels(figure)[0].collections
    colors = [tuple(color[:3]) for color in points.get_facecolor()]
    sizes = [colors.count(color) for color in dict.fromkeys(colors)]
    assert colors[0] == to_rgb(GREY)
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert len(sizes) == 6


def test_cells_that_a_figure_is_not_about_are_grey() -> None:
    adata = cells(3)
    highlight = (np.arange(adata.n_obs) % 2).astype(bool)
    figure = pl.embedding(adata, color=["truth", "depth"], highlight=highlight)
    (points,) = panels(figure)[0].collections
    shown = {tuple(place) for place in adata.obsm["X_umap"][highlight]}
    for place, color in zip(points.get_offsets(), points.get_facecolor(), strict=True):
        assert (tuple(color[:3]) == to_rgb(GREY)) == (tuple(place) not in shown)
    assert figure.legends[0].get_texts()[-1].get_text() == "other cells"
    others, coloured = panels(figure)[1].collections
    assert (len(others.get_offsets()), len(coloured.get_offsets())) == (
        *((~highlight).sum(), highlight.sum()),
    )


def test_numbers_have_a_scale_and_missing_values_are_grey() -> None:
    adata = cells(3)
    adata.obs.loc[adata.obs_names[:7], "depth"] = np.nan
    adata.obs["truth"] = adata.obs["truth"].where(np.arange(adata.n_obs) >= 7)
    figure = pl.embedding(adata, color=["depth", "truth", "depth"])
    depth, truth, scale = panels(figure)
    assert [len(points.get_offsets()) for points in depth.collections] == [7, 204]
    assert scale.get_ylim() == pytest.approx((adata.obs["depth"].min(), adata.obs["depth"].max()))
    assert truth.get_title() == "truth"
    assert figure.legends[0].get_texts()[-1].get_text() == "missing"


def test_umap_is_computed_beside_the_data_and_the_same_each_time() -> None:
    adata = cells(3)
    del adata.obsm["X_umap"], adata.uns["neighbors"]
    adata.obsm["X_umap"] = np.zeros((adata.n_obs, 2))  # of nothing known: not taken
    first, again = (panels(pl.embedding(adata, color="truth"))[0] for _ in range(2))
    assert not adata.uns
    assert not adata.obsp
    assert not adata.obsm["X_umap"].any()
    positions = np.asarray(first.collections[0].get_offsets())
    assert np.ptp(positions, axis=0).min() > 1
    np.testing.assert_array_equal(positions, again.collections[0].get_offsets())
    assert len(panels(pl.embedding(adata[:4], color="truth"))[0].collections[0].get_offsets()) == 4


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"color": ["truth", "kind"]}, "lacks 'kind'; it has 'truth', 'predicted', 'depth'"),
        (None, {"color": []}, "color is empty"),
        (None, {"color": "truth", "highlight": [True]}, "highlight is bool .1., expected bool"),
        (None, {"color": "truth", "key": "X_pca"}, "lacks 'X_pca', it has X_cellpatch.*tl.embed"),
        (slice(3), {"color": "truth"}, "there are 3 cells: UMAP needs at least 4"),
        (np.nan, {"color": "truth"}, "'X_cellpatch'.*NaN"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    change: slice | float | None, arguments: dict[str, Any], message: str
) -> None:
    adata = cells(3)
    del adata.uns["neighbors"]
    if isinstance(change, slice):
        adata = adata[change]
    elif change is not None:
        adata.obsm["X_cellpatch"][5, 2] = change
    with pytest.raises(InputError, match=message):
        pl.embedding(adata, **arguments)


# --- files ---------------------------------------------------------------------------------------


def test_saved_figures_are_equal_bytes_with_text_as_text(tmp_path: Path) -> None:
    for name in ("first", "again"):
        pl.embedding(cells(3), color=["truth", "depth"], save=tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 4
    for suffix in (".png", ".svg"):
        first, again = ((tmp_path / name).with_suffix(suffix) for name in ("first", "again"))
        assert first.read_bytes() == again.read_bytes()
    svg = (tmp_path / "first.svg").read_text()
    assert re.search(rf"<text[^>]*>{re.escape(LONG)} 02</text>", svg)
    assert "<dc:date>" not in svg


def test_the_suffix_says_what_is_saved(tmp_path: Path) -> None:
    pl.confusion_matrix(confusion(2), save=tmp_path / "a.SVG")
    pl.confusion_matrix(confusion(2), save=tmp_path / "b.png")
    assert {path.name for path in tmp_path.iterdir()} == {"a.SVG", "b.png"}
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"c\.pdf: figures are saved as \.png, \.svg"):
        pl.confusion_matrix(confusion(2), save=tmp_path / "c.pdf")


def test_a_shown_figure_does_not_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Figure] = []  # what a display would be given
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    figure = pl.confusion_matrix(confusion(2), show=True)
    assert shown == [figure]


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    adata = cells(3)
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(InputError, match=r"needs scanpy.*cellpatch-fast\[analysis\]"):
        pl.embedding(adata, color="truth")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"need matplotlib.*cellpatch-fast\[analysis\]"):
        pl.confusion_matrix(confusion(2))


def test_colours_of_few_classes_differ_in_lightness_or_hue_for_all_eyes() -> None:
    """Simulated (Viénot 1999): for red- and green-blind eyes too, no two colours are near."""
    to_lms = np.array(
        [[17.8824, 43.5161, 4.1193], [3.4557, 27.1554, 3.8671], [0.03, 0.1843, 1.467]]
    )
    red_blind = np.array([[0, 2.0234, -2.5258], [0, 1, 0], [0, 0, 1]])
    green_blind = np.array([[1, 0, 0], [0.4942, 0, 1.2483], [0, 0, 1]])
    for eye in (red_blind, green_blind):
        change = np.linalg.inv(to_lms) @ eye @ to_lms
        seen = [change @ np.array(to_rgb(color)) ** 2.2 for color in OKABE_ITO]
        seen = [np.clip(color, 0, 1) ** (1 / 2.2) for color in seen]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.1
