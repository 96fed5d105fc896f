"""One HTML page of a run: what was found, how it was measured, and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellpatch_fast.plots.page import Section, write_page

from .findings import (
    TARGET_GENES,
    curve,
    digits,
    ignored,
    linear_fit,
    median,
    ours,
    peers,
    ratio_genes,
    speed_up,
    targets,
    times,
)
from .results import Run
from .tables import Table, all_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {  # of sections, by their name in `all_tables`; the figures that they show
    "Runtime": ("Runtime against genes per cell", ("runtime", "speed-up", "memory")),
    "Aims": ("What was aimed for", ()),
    "Models": ("The models", ()),
    "Training": ("Training", ()),
    "Kernels": ("Kernels", ("roofline",)),
    "Loader": ("Loading", ()),
    "Atlas": ("Atlases", ("scaling",)),
    "Startup": ("Starting", ()),
    "Not measured": ("Without a time", ()),
}
METHODS = {  # by group
    "runtime": "Runtime is that of annotation: from genes and values on the device to the logits "
    "of every cell, without gradients. Cells have exactly so many genes: nobody computes padding. "
    "Not timed, for any model: reading, ranking, sampling and padding, which favours those that "
    "need them. All weights are random, of the architecture that is stated; the number of cells "
    "in a call is chosen for each model. A model that ignores genes beyond its cap is timed as it "
    "is, on the genes that it takes.",
    "training": "A training step is forward, backward and the optimiser's step. The original "
    "pretrains in parts of a batch, of the size that is fastest of some.",
    "kernels": "Kernels are first compared with a float64 reference on a small batch; one that is "
    "too inaccurate gets no speed.",
    "atlas": "Atlases are generated; time goes from the file to the finished embedding store.",
    "startup": "Starting is timed in new processes.",
}
COMMON = (
    "Times are medians, with the 20th and 80th percentiles in the results file; what happens once "
    "(making a model, compiling, the first call) is left out of them. Where memory or time ran "
    "out, that is the result. Other machines give other numbers: compare within a page."
)


def write_results_page(
    run: Run, path: str | Path, charts: Mapping[str, tuple[str, Figure | Path]]
) -> None:
    """Write the page, self-contained, whole or not at all.

    Parameters
    ----------
    run
        What it shows.
    path
        Of the .html file.
    charts
        The result of `all_charts`; a figure may be a file's path.
    """
    tables = all_tables(run)
    sections = [Section("In short", headline(run))]
    for name, (title, figures) in TITLES.items():
        shown = {charts[figure][0]: charts[figure][1] for figure in figures if figure in charts}
        if name in tables or shown:
            frames = {_caption(table): table.frame() for table in tables.get(name, [])}
            sections.append(Section(title, figures=shown, tables=frames))
    sections += [
        Section("How it was measured", method(run)),
        Section("Device, versions and settings", machine(run)),
    ]
    write_page(path, f"cellpatch-fast: benchmarks on {run.device['name']}", sections)


def headline(run: Run) -> str:
    """The main results in sentences, only of what was measured."""
    our_model, ratios = ours(run), ratio_genes(run)
    lines = [f"Measured on {run.device['name']}, {run.date[:10]}."]
    if our_model is not None and ratios:
        genes = TARGET_GENES if TARGET_GENES in ratios else ratios[-1]
        taken = median(run, our_model, genes)
        lines.append(
            f"{our_model} annotates 1,000 cells of {genes:,} genes in {digits(taken or 0)} s."
        )
        speed_ups = [(ratio, name) for name in peers(run) if (ratio := speed_up(run, name, genes))]
        if speed_ups:
            listed = "; ".join(
                f"{times(ratio)} {name}{_taken(run, name, genes)}"
                for ratio, name in sorted(speed_ups)
            )
            lines.append(f"Times as fast as the others there: {listed}.")
    fit = linear_fit(run)
    if fit:
        lines.append(
            f"The line through its times, {fit.genes[0]:,} to {fit.genes[-1]:,} genes: "
            f"{digits(1e6 * fit.fixed)} µs per cell and {digits(1e9 * fit.per_gene)} ns per gene, "
            f"R² = {fit.r_squared:.4f}."
        )
    missed = [target for target in targets(run) if target.met is False]
    if missed:
        listed = "; ".join(f"{target.name} ({target.missed_by})" for target in missed)
        lines.append(f"Missed of what was aimed for: {listed}.")
    return "\n\n".join(lines)


def _taken(run: Run, model: str, genes: int) -> str:
    """That a model does less."""
    out = ignored(run, curve(run, model)[genes])
    return f" (which takes {genes - out:,} of the genes)" if out else ""


def method(run: Run) -> str:
    """What was timed and what was not, of the groups that there are."""
    return "\n\n".join([*(text for group, text in METHODS.items() if run.of(group)), COMMON])


def machine(run: Run) -> str:
    """A line for each of what is known."""
    parts = {
        "Device": run.device,
        "Ceilings, measured in the same run": run.ceilings,
        "Versions": run.versions,
        "Settings": run.settings,
    }
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"{name}: {_written(value)}" for name, value in part.items())
        for title, part in parts.items()
        if part
    )


def _caption(table: Table) -> str:
    return " ".join([f"{table.caption}.", *table.notes])


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) or value < 1e5 else f"{value:.3g}"
    return "–" if value is None else str(value)
