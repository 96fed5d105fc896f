"""The picture of truth x predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cellpatch_fast.plots.confusion import save_confusion


def test_no_figure_of_an_earlier_table_stays_where_there_is_no_cell_to_draw(tmp_path: Path) -> None:
    table = pd.DataFrame(np.eye(3, dtype=np.int64), list("abc"), list("abc"))
    save_confusion(table, tmp_path / "confusion", others=0, title="good")
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "confusion.svg"}
    save_confusion(0 * table, tmp_path / "confusion", others=0, title="none")
    assert not list(tmp_path.iterdir())
