"""True labels to compare annotations with, and the file that says what a model calls them."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
import pytest

from cellpatch_fast import InputError
from cellpatch_fast.errors import InputWarning
from cellpatch_fast.inference.labels import read_label_map, true_labels
from cellpatch_fast.io.sources.tables import FrameTable

CLASSES = ["B", "T, naive"]


def labels(values: list[str | None], label_map: dict[str, str] | None = None) -> list[str | None]:
    table = FrameTable(pd.DataFrame({"type": pd.Categorical(values)}))
    return list(true_labels([table], ["cells.h5ad"], "type", label_map, CLASSES))


@pytest.mark.parametrize(
    "text",
    [
        'B cells,B\nPlasma,B\nnaive T,"T, naive"\n',
        '\ufeffcell_type, model\r\nB cells, B\r\n\r\nPlasma, B\r\nnaive T, "T, naive"',
    ],
)
def test_a_label_map_is_a_csv_file_with_or_without_a_header(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.csv"
    path.write_bytes(text.encode())
    found = labels(["B cells", "naive T", None, "Plasma", "B"], read_label_map(path))
    assert found == ["B", "T, naive", None, "B", "B"]


def test_a_header_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cellpatch_fast"):
        labels(["b"], {"cell_type": "model", "b": "B"})
    assert "label map: 'cell_type', 'model' is taken for a header" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: write lines such as"),
        ("b,B\nt\n", "line 2: expected two columns.*found 't'"),
        ("b;B\n", "line 1: expected two columns.*found 'b;B'"),
        ("b,B,1\n", "line 1: expected two columns.*found 'b,B,1'"),
        ("b,\n", "line 1: expected two columns.*found 'b,'"),
        ("b,B\nt,T\nb,T\n", "line 3: 'b' is 'T' here and 'B' further up"),
        ('"b,B\n', r"map\.csv cannot be read"),
        ("b,\udcff\n", r"map\.csv cannot be read"),
    ],
)
def test_label_maps_that_cannot_be_understood_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "map.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_label_map(path)


def test_a_label_map_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the label map .*nowhere\.csv cannot be read"):
        read_label_map(tmp_path / "nowhere.csv")


def test_a_pair_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("b,B\nb,B\n")
    assert read_label_map(tmp_path / "map.csv") == {"b": "B"}


def test_what_has_no_effect_in_a_label_map_is_warned_of() -> None:
    with pytest.warns(InputWarning) as caught:
        found = labels(["b", "t"], {"b": "B", "x": "B", "y": "B", "t": "T"})
    assert found == ["B", "T"]
    absent, strange, others = (str(warning.message) for warning in caught)
    assert absent == "label map: no cell has the label 'x', 'y'"
    assert strange == ("label map: 'T' is not among the model's classes, which are 'B', 'T, naive'")
    assert others.startswith("1 of 2 labelled cells have a label in obs['type'] that is not among")


def test_labels_that_the_model_lacks_are_warned_of_and_kept() -> None:
    with pytest.warns(InputWarning, match=r"3 of 4 .* classes: 'NK', 'DC' \(2 labels\).*label-map"):
        found = labels(["B", "NK", "DC", None, "NK"])
    assert found == ["B", "NK", "DC", None, "NK"]


def test_labels_of_the_model_need_no_word() -> None:
    assert labels(["B", None]) == ["B", None]  # a warning would be an error
    assert labels([None, None]) == [None, None]
