"""What a figure that was drawn shows."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import image
from matplotlib.figure import Figure
from matplotlib.text import Text

from cellpatch_fast.plots.figures import render

LONG = "CD8+/CD45RA+ Naive Cytotoxic"


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def panels(figure: Figure) -> list[Any]:
    """The figure's axes; matplotlib's own types promise less than they hold."""
    return list(figure.axes)


def pixels(figure: Figure) -> np.ndarray:
    """Of the PNG that is saved, [height, width, 3]."""
    return np.asarray(image.imread(io.BytesIO(render(figure, "png"))))[..., :3]


def assert_nothing_is_cut_off(figure: Figure) -> None:
    """There is something, and it does not reach the image's border."""
    ink = np.any(pixels(figure) < 0.99, axis=2)
    assert ink.mean() > 0.005
    assert not ink[[0, -1]].any()
    assert not ink[:, [0, -1]].any()


def confusion(classes: int) -> pd.DataFrame:
    """Counts with a full diagonal; the last class has no true cells."""
    names = [f"{LONG} {i}" for i in range(classes)]
    counts = np.diag(np.arange(classes)[::-1] * 97) + np.tri(classes, k=-1, dtype=int)
    counts[-1] = 0
    return pd.DataFrame(counts, index=names, columns=names)
