"""One HTML page that shows a result: text, figures and tables in a single file.

It opens anywhere and for ever: figures lie in it as data, and nothing is fetched or executed. A
page this simple needs no template library; `html.escape` and pandas' ``to_html`` are enough.
Figures are embedded as images, so that the names within one SVG cannot clash with another's.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import write_whole
from .figures import render

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --faint: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #17181a; --faint: #a0a0a0; --line: #3a3b3e; }
}
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin-top: 2.8rem; }
p { max-width: 42rem; white-space: pre-line; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; overflow-x: auto; }
figcaption { color: var(--faint); font-size: 0.9rem; margin-bottom: 0.4rem; }
img { display: block; max-width: 100%; background: #fff; padding: 0.6rem; border-radius: 4px;
  box-sizing: border-box; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
tbody th { font-weight: normal; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; }
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  h2, figcaption { break-after: avoid; }
  img, tr { break-inside: avoid; }
  img { max-height: 22cm; padding: 0; }
  figure { overflow: visible; }
}
"""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Parameters
    ----------
    title
        Its heading.
    text
        Plain text; an empty line begins a paragraph.
    figures
        By caption: figures, or paths of .svg and .png files.
    tables
        By caption: data frames, shown with their index.
    """

    title: str
    text: str = ""
    figures: Mapping[str, Figure | str | Path] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write one self-contained HTML page, whole or not at all.

    Parameters
    ----------
    path
        Of the .html file.
    title
        Of the page.
    sections
        What it shows, in order: of each the text, then the figures, then the tables.

    Raises
    ------
    InputError
        If a figure's file is neither .svg nor .png.
    OSError
        If a figure's file cannot be read, or the page cannot be written.
    """
    heading = html.escape(title)
    body = "\n".join(map(_section, sections))
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{heading}</h1>
{body}
</body>
</html>
"""
    write_whole(path, page)


def _section(section: Section) -> str:
    paragraphs = [text.strip() for text in section.text.split("\n\n")]
    return "\n".join(
        [
            f"<section>\n<h2>{html.escape(section.title)}</h2>",
            *(f"<p>{html.escape(text)}</p>" for text in paragraphs if text),
            *(_framed(caption, _image(caption, it)) for caption, it in section.figures.items()),
            *(_framed(caption, _table(table)) for caption, table in section.tables.items()),
            "</section>",
        ]
    )


def _framed(caption: str, content: str) -> str:
    return f"<figure>\n<figcaption>{html.escape(caption)}</figcaption>\n{content}\n</figure>"


def _image(caption: str, figure: Figure | str | Path) -> str:
    if isinstance(figure, str | Path):
        path = Path(figure)
        if path.suffix.lower() not in MEDIA_TYPES:
            raise InputError(f"{path} is neither .svg nor .png: save the figure as one of them")
        media_type, content = MEDIA_TYPES[path.suffix.lower()], path.read_bytes()
    else:
        media_type, content = MEDIA_TYPES[".svg"], render(figure, "svg")
    data = base64.b64encode(content).decode("ascii")
    return f'<img alt="{html.escape(caption)}" src="data:{media_type};base64,{data}">'


def _table(table: pd.DataFrame) -> str:
    """Numbers with three decimals, to the right; missing values as a dash, texts in full.

    Texts that are numbers go to the right where the frame's ``attrs["numbers"]`` says so.
    """
    import pandas as pd

    numbers = len(table.select_dtypes("number").columns) == len(table.columns)
    kind = "numbers" if numbers or table.attrs.get("numbers") else "texts"
    shown = table if numbers else table.astype(object).where(table.notna(), "–")
    named = shown.rename_axis(index=None, columns=table.index.name)  # in the corner, not a row
    with pd.option_context("display.max_colwidth", None):
        return named.to_html(border=0, classes=kind, float_format="{:.3f}".format, na_rep="–")
