"""Tables of a run: Markdown for the README and the report, data frames for the page.

A cell of a table says what came of an attempt: a number, or "out of memory", or a dash where
nothing was tried. A group without records has no tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .findings import (
    compared,
    curve,
    digits,
    genes_tried,
    ignored,
    linear_fit,
    peers,
    ratio_genes,
    size,
    speed_up,
    targets,
    times,
)
from .results import Record, Run

if TYPE_CHECKING:
    import pandas as pd

CAPPED = "†"
NOTHING = "–"
DESCRIPTIONS = ("architecture", "setting", "assumed", "source")  # of a model


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()
    numbers: bool = True  # all columns but the first to the right

    def markdown(self) -> str:
        """With the caption above and the notes below."""
        rule = "---:" if self.numbers else "---"
        lines = [self.header, ["---", *[rule] * (len(self.header) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines)
        return "\n\n".join([f"**{escape(self.caption)}**", body, *map(escape, self.notes)])

    def frame(self) -> pd.DataFrame:
        """As `reports.Section` takes it."""
        import pandas as pd

        index = pd.Index([row[0] for row in self.rows], name=self.header[0])
        frame = pd.DataFrame([row[1:] for row in self.rows], index=index, columns=self.header[1:])
        frame.attrs["numbers"] = self.numbers
        return frame


def all_tables(run: Run) -> dict[str, list[Table]]:
    """Tables by section, in the order of a report; sections without any are left out."""
    sections = {
        "Aims": target_table(run),
        "Runtime": runtime_tables(run),
        "Models": model_tables(run),
        "Training": training_tables(run),
        "Kernels": kernel_tables(run),
        "Loader": loader_table(run),
        "Atlas": atlas_table(run),
        "Startup": startup_table(run),
        "Not measured": missing_table(run),
    }
    return {name: tables for name, tables in sections.items() if tables}


def runtime_tables(run: Run) -> list[Table]:
    """Seconds and memory of every model at every number of genes, and our line."""
    genes = genes_tried(run)
    if not genes:
        return []
    ratios = ratio_genes(run)
    header = ["model, genes per cell", *(f"{g:,}" for g in genes)]
    seconds = [
        [
            _name(run, model),
            *(_seconds(run, curve(run, model).get(g)) for g in genes),
            *(_ratio(run, model, g) for g in ratios),
        ]
        for model in compared(run)
    ]
    memory = [
        [_name(run, model), *(_memory(run, curve(run, model).get(g)) for g in genes)]
        for model in compared(run)
        if any(r.details.get("peak_bytes_per_cell") is not None for r in curve(run, model).values())
    ]
    notes = _cap_notes(run)
    tables = [
        Table(
            "Annotation, seconds per 1,000 cells (median)",
            header + [f"× ours at {g:,}" for g in ratios],
            seconds,
            (*notes, *_fit_notes(run)),
        )
    ]
    if memory:
        caption = "Peak memory of a batch, per cell (the model itself not counted)"
        tables.append(Table(caption, header, memory, notes))
    return tables + _apart_tables(run)


def _apart_tables(run: Run) -> list[Table]:
    """What happens once, which the times leave out, and how many cells a call takes."""
    rows = []
    for model in compared(run):
        details = [r.details for r in curve(run, model).values() if r.measured]
        kept = ("setup_seconds", "first_call_seconds", "batch")
        setup, first, batch = ([d[key] for d in details if d.get(key) is not None] for key in kept)
        if setup or first or batch:
            cells = (
                dict.fromkeys(f"{n:,}" for n in (min(batch), max(batch))) if batch else [NOTHING]
            )
            seconds = [digits(max(all_)) if all_ else NOTHING for all_ in (setup, first)]
            rows.append([_name(run, model), *seconds, " to ".join(cells)])
    header = ["model", "making it, s (longest)", "first call, s (longest)", "cells in a call"]
    return [Table("Once, and not in the times above", header, rows)] if rows else []


def target_table(run: Run) -> list[Table]:
    rows = [[target.name, target.aim, target.found, target.verdict] for target in targets(run)]
    header = ["what", "aim", "found", "verdict"]
    return [Table("Aims, and what was found", header, rows, numbers=False)] if rows else []


def model_tables(run: Run) -> list[Table]:
    """Parameters as counted and as their authors state them, and how each model is run."""
    models = sorted(run.models.items(), key=lambda model: not model[1]["ours"])
    if not models:
        return []
    numbers = [
        [
            _name(run, name),
            _count(model.get("parameters")),
            _count(model.get("published")),
            _difference(model.get("parameters"), model.get("published")),
            "all" if model.get("cap") is None else f"{model['cap']:,}",
        ]
        for name, model in models
    ]
    kinds = [kind for kind in DESCRIPTIONS if any(model.get(kind) for _, model in models)]
    texts = [
        [_name(run, name), *(str(model.get(kind) or NOTHING) for kind in kinds)]
        for name, model in models
    ]
    header = ["model", "parameters", "published", "difference", "genes it takes"]
    return [
        Table("Models, with random weights", header, numbers),
        Table("How each is built and run", ["model", *kinds], texts, numbers=False),
    ]


def training_tables(run: Run) -> list[Table]:
    """Steps of each task, of the same cells and genes for every model."""
    cases: dict[str, list[Record]] = {}
    for record in run.of("training", measured=True):
        task, cells, genes = (record.details.get(key) for key in ("task", "cells", "genes"))
        case = f"A step of {task}, {_count(cells)} cells of {_count(genes)} genes"
        cases.setdefault(case, []).append(record)
    tables = []
    for case, records in cases.items():
        mine = [r for r in records if run.models.get(r.details["model"], {}).get("ours")]
        rows = [
            [
                _name(run, record.details["model"]),
                *_spread(record),
                _rate(record.details.get("cells_per_second")),
                _over(record, mine[0] if mine else None),
            ]
            for record in sorted(records, key=lambda record: record not in mine)
        ]
        header = ["model", "seconds (median)", "20–80 %", "cells/s", "× ours"]
        tables.append(Table(case, header, rows))
    return tables


def kernel_tables(run: Run) -> list[Table]:
    """Of each op: the rates of all methods, and what ours reaches of the device."""
    records = run.of("kernels", measured=True)
    tables = []
    for op in dict.fromkeys(record.details["op"] for record in records):
        of_op = [record for record in records if record.details["op"] == op]
        cases = list(dict.fromkeys(record.details["case"] for record in of_op))
        methods = sorted(
            dict.fromkeys(map(_method, of_op)),
            key=lambda method: (
                not any(r.details.get("ours") for r in of_op if _method(r) == method)
            ),
        )
        rates = {(_method(r), r.details["case"]): r.details.get("genes_per_second") for r in of_op}
        rows = [[m, *(_rate(rates.get((m, case)), 1e6) for case in cases)] for m in methods]
        tables.append(Table(f"{op}, million genes/s by case", ["method", *cases], rows))
    mine = [record for record in records if record.details.get("ours")]
    if mine:
        unit, rate = ("GFLOP/s", 1e9) if run.device["type"] == "cpu" else ("TFLOP/s", 1e12)
        header = [
            *("ours: op, case", "µs a call (median)", unit, "GB/s", "of the roofline"),
            *("relative error", "allowed"),
        ]
        tables.append(Table("Our kernels", header, [_kernel(record, rate) for record in mine]))
    return tables


def loader_table(run: Run) -> list[Table]:
    rows = [
        [
            f"{record.details['system']}, {record.details['layout']}",
            _rate(record.details.get("nonzeros_per_second"), 1e6),
            _rate(record.details.get("cells_per_second")),
            *_spread(record),
        ]
        for record in run.of("loader", measured=True)
    ]
    header = ["loader, layout", "million non-zeros/s", "cells/s", "seconds (median)", "20–80 %"]
    return [Table("Loaders and layouts", header, rows)] if rows else []


def atlas_table(run: Run) -> list[Table]:
    rows = [
        [
            f"{record.details['cells']:,}",
            _count(record.details.get("genes_per_cell")),
            _spread(record)[0],
            _rate(record.details.get("cells_per_second")),
            _bytes(record.details.get("peak_rss_bytes")),
            _bytes(record.details.get("output_bytes")),
        ]
        for record in run.of("atlas", measured=True)
    ]
    header = ["cells", "genes per cell", "seconds", "cells/s", "peak memory", "output"]
    return [Table("From file to embedding store", header, rows)] if rows else []


def startup_table(run: Run) -> list[Table]:
    rows = [
        [record.details["what"], *_spread(record)] for record in run.of("startup", measured=True)
    ]
    header = ["what", "seconds (median)", "20–80 %"]
    return [Table("Times to start", header, rows)] if rows else []


def missing_table(run: Run) -> list[Table]:
    """Every attempt without a time, and why; those with the same reason together."""
    missing: dict[tuple[str, str], list[str]] = {}
    for record in run.records:
        if not record.measured:
            missing.setdefault((record.status, record.reason), []).append(record.name)
    rows = [["; ".join(names), status, reason] for (status, reason), names in missing.items()]
    header = ["what", "status", "why"]
    return [Table("Tried or skipped, and without a time", header, rows, numbers=False)] * bool(rows)


def _kernel(record: Record, unit: float) -> list[str]:
    details = record.details
    share, error, bound = (details.get(key) for key in ("roofline_share", "error", "bound"))
    return [
        f"{details['op']}, {details['case']}" + _form(record),
        digits(1e6 * record.seconds.median) if record.seconds else NOTHING,
        _rate(details.get("flops"), unit),
        _rate(details.get("bytes_per_second"), 1e9),
        NOTHING if share is None else f"{share:.0%}",
        NOTHING if error is None else f"{error:.1e}",
        NOTHING if bound is None else f"{bound:.1e}",
    ]


def _method(record: Record) -> str:
    return str(record.details["method"]) + _form(record)


def _form(record: Record) -> str:
    form = record.details.get("form")
    return f", {form}" if form else ""


def _seconds(run: Run, record: Record | None) -> str:
    if record is None:
        return NOTHING
    if record.seconds is None:
        return record.status
    return digits(record.seconds.median) + _mark(run, record)


def _memory(run: Run, record: Record | None) -> str:
    if record is None or (record.measured and record.details.get("peak_bytes_per_cell") is None):
        return NOTHING
    if not record.measured:
        return record.status
    return size(record.details["peak_bytes_per_cell"]) + _mark(run, record)


def _mark(run: Run, record: Record) -> str:
    return CAPPED if ignored(run, record) else ""


def _ratio(run: Run, model: str, genes: int) -> str:
    ratio = speed_up(run, model, genes)
    record = curve(run, model).get(genes)
    return NOTHING if ratio is None or record is None else times(ratio) + _mark(run, record)


def _over(record: Record, reference: Record | None) -> str:
    if reference is None or reference.seconds is None or record.seconds is None:
        return NOTHING
    return times(record.seconds.median / reference.seconds.median)


def _cap_notes(run: Run) -> tuple[str, ...]:
    """Which models of the table ignore genes, beyond how many."""
    caps = [
        f"{model}: {'some' if cap is None else f'{cap:,}'}"
        for model in compared(run)
        for cap in [run.models[model].get("cap")]
        if any(ignored(run, record) for record in curve(run, model).values() if record.measured)
    ]
    if not caps:
        return ()
    return (f"{CAPPED} the model ignores the genes of a cell beyond its cap ({'; '.join(caps)}).",)


def _fit_notes(run: Run) -> tuple[str, ...]:
    fit = linear_fit(run)
    if fit is None:
        return ()
    return (
        f"Ours: {digits(1e6 * fit.fixed)} µs per cell + {digits(1e9 * fit.per_gene)} ns per gene, "
        f"R² = {fit.r_squared:.4f} over {fit.genes[0]:,} to {fit.genes[-1]:,} genes.",
    )


def _name(run: Run, model: str) -> str:
    """Ours stand out where there are others."""
    return f"{model} (ours)" if peers(run) and _is_ours(run, model) else model


def _is_ours(run: Run, model: str) -> bool:
    return bool(run.models.get(model, {}).get("ours")) and "ours" not in model.lower()


def _spread(record: Record) -> tuple[str, str]:
    if record.seconds is None:
        return NOTHING, NOTHING
    seconds = record.seconds
    return digits(seconds.median), f"{digits(seconds.p20)}–{digits(seconds.p80)}"


def _count(count: float | None) -> str:
    return NOTHING if count is None else f"{count:,.0f}"


def _rate(rate: float | None, unit: float = 1.0) -> str:
    return NOTHING if rate is None else digits(rate / unit)


def _bytes(count: float | None) -> str:
    return NOTHING if count is None else size(count)


def _difference(measured: float | None, published: float | None) -> str:
    if not measured or not published:
        return NOTHING
    return f"{measured / published - 1:+.1%}" if measured != published else "none"


def escape(text: str) -> str:
    """Text in one line of Markdown, whatever it holds."""
    return re.sub(r"([\\|*_`\[\]<>])", r"\\\1", " ".join(text.split()))
