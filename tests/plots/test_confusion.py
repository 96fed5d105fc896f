"""The picture of truth x predicted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellpatch_fast import InputError, pl
from cellpatch_fast.inference.evaluation import evaluate
from cellpatch_fast.plots.confusion import save_confusion

from .drawn import LONG, assert_nothing_is_cut_off, confusion, panels, texts

pytestmark = pytest.mark.usefixtures("nothing_is_left_to_pyplot")


@pytest.mark.parametrize("classes", [2, 23])
def test_confusion_matrix_of_any_size_is_complete(classes: int) -> None:
    figure = pl.confusion_matrix(confusion(classes))
    found = texts(figure)
    assert {f"{LONG} {i}" for i in range(classes)} <= set(found)
    assert f"{LONG} 0 ({97 * (classes - 1):,})" in found
    assert_nothing_is_cut_off(figure)
    axes = panels(figure)[0]
    columns = [label.get_window_extent().intervalx for label in axes.get_xticklabels()]
    rows = [label.get_window_extent().intervaly for label in axes.get_yticklabels()][::-1]
    for names in (columns, rows):  # none overlaps the next
        assert all(one.max() < other.min() for one, other in pairwise(names))


def test_confusion_matrix_shares_are_of_the_true_class() -> None:
    counts = pd.DataFrame([[3, 1], [0, 0], [20, 980]], index=list("abc"), columns=list("ab"))
    (shown,) = panels(pl.confusion_matrix(counts))[0].images
    shares = np.ma.filled(shown.get_array(), np.nan)
    np.testing.assert_array_equal(shares, [[0.75, 0.25], [np.nan, np.nan], [0.02, 0.98]])


def test_confusion_matrix_writes_percentages_or_counts() -> None:
    counts = pd.DataFrame([[3, 1], [4, 1996]], index=list("ab"), columns=list("ab"))
    numbers = [text.get_text() for text in panels(pl.confusion_matrix(counts))[0].texts]
    assert numbers == ["75", "25", "100"]  # 0.2% is left blank
    figure = pl.confusion_matrix(counts, normalize=False, title="mine")
    assert [text.get_text() for text in panels(figure)[0].texts] == ["3", "1", "4", "1,996"]
    assert "mine" in texts(figure)


def test_numbers_that_do_not_fit_into_the_matrix_are_left_out() -> None:
    counts = pd.DataFrame(np.eye(61, dtype=int) * 1_234_567)
    counts.iloc[0, 1] = 89
    written = [
        text.get_text() for text in panels(pl.confusion_matrix(counts, normalize=False))[0].texts
    ]
    assert written == ["89"]


def test_confusion_matrix_of_an_evaluation_says_how_good_it_is() -> None:
    figure = pl.confusion_matrix(evaluate(["B", "T"], ["B", "unknown"], ["B", "T"]))
    assert {"accuracy 0.500, macro F1 0.500", "unknown"} <= set(texts(figure))


def test_labels_that_a_model_lacks_stand_below_a_line() -> None:
    figure = pl.confusion_matrix(evaluate(["B", "T", "NK", "NK"], list("BTTB"), ["B", "T"]))
    (axes, *_) = panels(figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B (1)", "T (1)", "NK (2)"]
    assert list(axes.lines[0].get_ydata()) == [1.5, 1.5]
    assert "on 2 of 4 labelled cells (50.0%)\noverall accuracy 0.500" in "".join(texts(figure))
    assert_nothing_is_cut_off(figure)


def test_a_great_many_labels_that_a_model_lacks_share_a_row() -> None:
    labels = [f"cluster {i}" for i in range(1_000) for _ in range(1 + (i == 7))]
    figure = pl.confusion_matrix(evaluate(labels, ["B"] * len(labels), ["B"]))
    rows = [label.get_text() for label in panels(figure)[0].get_yticklabels()]
    assert rows[:2] == ["B (0)", "cluster 7 (2)"]
    assert rows[-1] == "960 further labels (960)"
    assert len(rows) == 1 + 40 + 1


@pytest.mark.parametrize("bad", [[[-1.0]], [[np.nan]], [["many"]], np.empty((0, 0))])
def test_what_is_no_confusion_matrix_is_refused(bad: list[list[object]]) -> None:
    with pytest.raises(InputError, match="a confusion matrix holds counts"):
        pl.confusion_matrix(pd.DataFrame(bad))


def test_no_figure_of_an_earlier_table_stays_where_there_is_no_cell_to_draw(tmp_path: Path) -> None:
    table = pd.DataFrame(np.eye(3, dtype=np.int64), list("abc"), list("abc"))
    save_confusion(table, tmp_path / "confusion", others=0, title="good")
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "confusion.svg"}
    save_confusion(0 * table, tmp_path / "confusion", others=0, title="none")
    assert not list(tmp_path.iterdir())
