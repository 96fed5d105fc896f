"""How figures are made and kept: without a display, the same bytes each time, whole or not at all.

Figures are matplotlib's own `Figure` objects: pyplot, which keeps every figure that it makes until
it is closed, is only called to show one. In an SVG, text is text (it can be searched, and edited
in a drawing program); nothing in the file depends on the day or on chance.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from ..files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; those that are
# weak on white paper (yellow) or strong (black) come last.
OKABE_ITO = (
    "#0072B2",  # blue
    "#E69F00",  # orange
    "#009E73",  # bluish green
    "#D55E00",  # vermillion
    "#56B4E9",  # sky blue
    "#CC79A7",  # reddish purple
    "#000000",  # black
    "#F0E442",  # yellow
)
GREY = "#BBBBBB"
DOTS_PER_INCH = 200
FORMATS = ("png", "svg")


def new_figure(width: float, height: float, show: bool = False) -> Figure:
    """An empty figure, sizes in inches; one that is to be shown belongs to pyplot until then."""
    require_matplotlib()
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    make = pyplot.figure if show else Figure
    return make(figsize=(width, height), layout="constrained")


def finish(figure: Figure, save: str | Path | None, show: bool) -> Figure:
    """Save and show a figure as the user asked; pyplot forgets it."""
    if save is not None:
        save_figure(figure, save)
    if show:
        from matplotlib import pyplot

        pyplot.show()
        pyplot.close(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``path``, or without a suffix both ``path.png`` and ``path.svg``.

    Raises
    ------
    InputError
        If the suffix is another than .png and .svg.
    """
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix in FORMATS:
        write_whole(path, render(figure, suffix))
    elif not suffix:
        for format_ in FORMATS:
            write_whole(path.with_name(f"{path.name}.{format_}"), render(figure, format_))
    else:
        raise InputError(f"{path}: figures are saved as .png, .svg, or, without a suffix, as both")


def render(figure: Figure, format_: Literal["png", "svg"] | str) -> bytes:
    """The figure as the content of a file; nothing of it is cut off."""
    from matplotlib import rc_context

    options: dict[str, Any] = {"metadata": {"Date": None}} if format_ == "svg" else {}
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "cellpatch", "svg.fonttype": "none"}):
        figure.savefig(content, format=format_, dpi=DOTS_PER_INCH, bbox_inches="tight", **options)
    return content.getvalue()


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "figures need matplotlib: pip install 'cellpatch-fast[analysis]'"
        ) from error
