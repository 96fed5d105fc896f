"""The report of a results file: tables, figures and a page, named after it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from cellpatch_fast.errors import InputError
from cellpatch_fast.files import write_whole
from cellpatch_fast.plots.figures import FORMATS, require_matplotlib, save_figure

from .charts import all_charts
from .page import headline, write_results_page
from .results import Run, require_writable
from .tables import all_tables, escape


def write_report(run: str | Path, folder: str | Path | None = None) -> list[Path]:
    """Make the report of a results file.

    Parameters
    ----------
    run
        The results file, ``<stem>.json``.
    folder
        Where to write ``<stem>.md``, ``<stem>.html`` and the figures ``<stem>-<name>.png`` and
        ``.svg``; None: beside the results file. Older ones are replaced.

    Returns
    -------
    The files, each written whole.

    Raises
    ------
    InputError
        If it is not a results file, matplotlib is missing, or the folder cannot be written.
    """
    source = Path(run)
    loaded = Run.load(source)
    require_matplotlib()
    folder = source.parent if folder is None else Path(folder)
    require_writable(folder)
    charts = all_charts(loaded)
    paths = {
        name: {suffix: folder / f"{source.stem}-{name}.{suffix}" for suffix in FORMATS}
        for name in charts
    }
    text, page = (folder / f"{source.stem}.{suffix}" for suffix in ("md", "html"))
    try:
        for name, (_, figure) in charts.items():
            for path in paths[name].values():
                save_figure(figure, path)
        captions = {name: caption for name, (caption, _) in charts.items()}
        shown = {paths[name]["png"].name: caption for name, caption in captions.items()}
        write_whole(text, markdown(loaded, shown))
        embedded = {name: (caption, paths[name]["svg"]) for name, caption in captions.items()}
        write_results_page(loaded, page, embedded)
    except OSError as error:
        raise InputError(f"the report in {folder} could not be finished: {error}") from error
    return [text, page, *(path for files in paths.values() for path in files.values())]


def markdown(run: Run, figures: dict[str, str]) -> str:
    """All tables, and figures by path with their captions."""
    parts = [f"# Benchmarks: {escape(run.device['name'])}, {run.date[:10]}"]
    parts += map(escape, headline(run).split("\n\n"))
    parts += [f"![{escape(caption)}]({quote(path)})" for path, caption in figures.items()]
    for name, tables in all_tables(run).items():
        parts += [f"## {name}", *(table.markdown() for table in tables)]
    return "\n\n".join(parts) + "\n"
