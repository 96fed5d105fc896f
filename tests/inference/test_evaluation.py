"""Predicted against true cell types: the numbers, their conventions, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from cellpatch_fast import InputError
from cellpatch_fast.inference.evaluation import UNKNOWN, evaluate

CLASSES = ["CD8+/CD45RA+ Naive Cytotoxic", "B", "CD14+ Monocyte"]
FILES = {"metrics.json", "per_class.csv", "confusion.csv"}

cells = st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(CLASSES)), min_size=1)


@given(cells)
@settings(max_examples=15, deadline=None)
def test_numbers_are_those_of_scikit_learn(cells: list[tuple[str, str]]) -> None:
    truth, predicted = map(list, zip(*cells, strict=True))
    found = evaluate(truth, predicted, CLASSES)
    assert found.accuracy == metrics.accuracy_score(truth, predicted)
    assert found.adjusted_rand_index == metrics.adjusted_rand_score(truth, predicted)
    of_truth: dict[str, Any] = {"labels": sorted(set(truth)), "zero_division": 0}
    expected = metrics.f1_score(truth, predicted, average="macro", **of_truth)
    assert found.macro_f1 == pytest.approx(expected, abs=1e-12)
    assert found.cells == len(cells) == found.confusion.to_numpy().sum()
    for name, row in found.per_class.iterrows():
        own = [one == name for one in truth], [one == name for one in predicted]
        assert row["precision"] == metrics.precision_score(*own, zero_division=0)
        assert row["recall"] == metrics.recall_score(*own, zero_division=0)
        assert row["f1"] == pytest.approx(metrics.f1_score(*own, zero_division=0), abs=1e-12)
        assert row["cells"] == sum(own[0])


def test_confusion_has_truth_in_rows_and_the_order_of_the_model() -> None:
    truth = ["B", "B", "B", "CD14+ Monocyte", "CD14+ Monocyte"]
    predicted = ["B", "CD14+ Monocyte", "CD14+ Monocyte", "CD14+ Monocyte", UNKNOWN]
    found = evaluate(truth, predicted, ["CD14+ Monocyte", "never seen", "B"])
    assert found.classes == ("CD14+ Monocyte", "B") == tuple(found.per_class.index)
    assert list(found.confusion.index) == ["CD14+ Monocyte", "B"]
    assert list(found.confusion.columns) == ["CD14+ Monocyte", "B", UNKNOWN]
    assert found.confusion.to_numpy().tolist() == [[1, 0, 1], [2, 1, 0]]
    assert (found.confusion.index.name, found.confusion.columns.name) == ("truth", "predicted")


def test_unknown_cells_are_wrong_and_no_class() -> None:
    found = evaluate(["B", "B", "T", "T"], ["B", "B", "T", UNKNOWN], ["B", "T"])
    assert found.accuracy == 0.75
    assert found.unknown_share == 0.25
    assert found.macro_f1 == pytest.approx((1 + 2 / 3) / 2)  # not a third of it for "unknown"
    assert "25.0% of them left unknown" in str(found)


def test_a_class_that_is_only_predicted_is_shown_but_not_averaged() -> None:
    found = evaluate(["B", "B"], ["B", "T"], ["B", "T"])
    assert found.macro_f1 == pytest.approx(2 / 3)
    assert found.per_class.loc["T"].tolist() == [0, 0, 0, 0, 0]
    assert "on 2 cells of 1 classes" in str(found)


def test_every_true_label_has_a_row_and_accuracy_says_which_cells_it_is_of() -> None:
    truth = pd.Series(["B", "NK", "T", "DC", None, np.nan, "T", "DC"], dtype="category")
    predicted = ["B", "B", "T", UNKNOWN, "T", "T", "B", "T"]
    found = evaluate(truth, predicted, ["B", "T"])
    assert (found.cells, found.labelled_cells, found.unlabelled_cells) == (3, 6, 2)
    assert found.other_labels == ("DC", "NK")  # the most frequent first
    assert list(found.confusion.index) == ["B", "T", "DC", "NK"]
    assert found.confusion.to_numpy().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert found.confusion.to_numpy().sum() == found.labelled_cells
    assert list(found.per_class.index) == ["B", "T"]
    assert found.unknown_share == 0  # of the three
    assert str(found).splitlines() == [
        "accuracy 0.667, macro F1 0.667 on 3 of 6 labelled cells (50.0%), of 2 classes",
        "overall accuracy 0.333, adjusted Rand index -0.216 on all 6 labelled cells",
        "3 with a label that is not among the model's classes ('DC', 'NK'), which counts as wrong "
        "overall; 2 more without a label",
    ]


@given(st.lists(st.tuples(st.sampled_from("abcxyz"), st.sampled_from([*"abc", UNKNOWN]))))
@settings(max_examples=15, deadline=None)
def test_overall_numbers_are_of_all_labelled_cells(cells: list[tuple[str, str]]) -> None:
    cells.append(("x", "a"))  # a label that the model lacks
    truth, predicted = map(list, zip(*cells, strict=True))
    found = evaluate(truth, predicted, list("abc"))
    right = sum(one == other for one, other in cells)
    assert found.overall_accuracy == pytest.approx(right / len(cells))
    assert found.adjusted_rand_index == metrics.adjusted_rand_score(truth, predicted)
    assert found.metrics()["overall_accuracy"] == found.overall_accuracy
    for name, precision in found.per_class["overall_precision"].items():
        own = [one == name for one in truth], [one == name for one in predicted]
        assert precision == metrics.precision_score(*own, zero_division=0)


def test_a_label_that_is_called_unknown_is_never_right() -> None:
    found = evaluate(["B", UNKNOWN], ["B", UNKNOWN], ["B"])
    assert found.overall_accuracy == 0.5
    assert found.confusion.loc[UNKNOWN].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("truth", "predicted", "text"),
    [
        (["x", "y", "x"], ["B", UNKNOWN, "B"], "no label is among the model's classes: no accur"),
        (["x", "y"], [UNKNOWN, UNKNOWN], "no label is among the model's classes: no accuracy"),
        ([None, None], ["B", UNKNOWN], "no cell has a label: there is nothing to compare with"),
        ([], [], "no cell has a label"),
    ],
)
def test_numbers_of_no_cells_are_missing_and_said_so(
    truth: list[str], predicted: list[str], text: str, tmp_path: Path
) -> None:
    probabilities = np.full((len(truth), 2), 0.5)
    found = evaluate(truth, predicted, ["B", "T"], probabilities=probabilities)
    assert str(found).startswith(text)
    assert np.isnan([found.accuracy, found.macro_f1, found.unknown_share]).all()
    found.save(tmp_path)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert (saved["accuracy"], saved["macro_f1"], saved["log_loss"]) == (None, None, None)
    confusion = pd.read_csv(tmp_path / "confusion.csv", index_col="truth")
    assert confusion.to_numpy().sum() == found.labelled_cells


def test_numbers_as_labels_are_names() -> None:
    assert evaluate(np.array([3, 7]), ["3", "3"], ["3", "7"]).accuracy == 0.5


def test_log_loss_is_that_of_the_evaluated_cells() -> None:
    probabilities = np.array([[0.1, 0.9], [0.25, 0.75], [0.5, 0.5]], np.float32)
    found = evaluate(["B", "T", "NK"], ["B", "B", "B"], ["T", "B"], probabilities=probabilities)
    assert found.log_loss == pytest.approx(-(np.log(0.9) + np.log(0.25)) / 2)
    assert evaluate(["B"], ["B"], ["B"]).log_loss is None


def test_saved_files_hold_the_numbers_and_nothing_unfinished_stays(tmp_path: Path) -> None:
    found = evaluate(["B", "T", "T"], ["B", UNKNOWN, "T"], ["B", "T"])
    folder = tmp_path / "new" / "run"
    for _ in range(2):  # the second time it replaces them
        found.save(folder)
        assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "metrics.json").read_text()) == found.metrics()
    per_class = pd.read_csv(folder / "per_class.csv", index_col="class")
    pd.testing.assert_frame_equal(per_class, found.per_class)
    confusion = pd.read_csv(folder / "confusion.csv", index_col="truth")
    pd.testing.assert_frame_equal(confusion, found.confusion, check_names=False)


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "per_class.csv").mkdir()
    with pytest.raises(OSError, match=r"per_class\.csv"):
        evaluate(["B"], ["B"], ["B"]).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "per_class.csv"}


@pytest.mark.parametrize(
    ("truth", "predicted", "classes", "message"),
    [
        (["B", "B"], ["B"], ["B"], "2 true labels, 1 predicted"),
        (["B", "B"], ["B", "NK"], ["B", "T"], "hold 'NK', neither one of the classes"),
        (["B"], ["B"], ["B", "T", "B"], "classes hold 'B' more than once"),
        (["B"], ["B"], ["B", UNKNOWN], "'unknown' is one of the classes"),
    ],
)
def test_bad_input_is_refused_with_what_was_found(
    truth: list[str], predicted: list[str], classes: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(truth, predicted, classes)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ([[0.5, 0.5]], r"are \(1, 2\), expected \[cells, classes\] = \(2, 2\)"),
        ([[0.5, 0.5], [1, 2]], "sum to 1"),
        ([[1.5, -0.5], [1, 0]], "from 0 to 1"),
        ([[np.nan, 1], [1, 0]], "from 0 to 1"),
    ],
)
def test_bad_probabilities_are_refused(probabilities: list[list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(["B", "T"], ["B", "T"], ["B", "T"], probabilities=probabilities)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install 'cellpatch-fast\[analysis\]'"):
        evaluate(["B"], ["B"], ["B"])
