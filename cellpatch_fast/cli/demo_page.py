"""The page of ``cellpatch demo``: what this is, what was done and came out, how fast, what next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import pl
from ..plots.page import Section, write_page
from .demo_results import (
    ANNOTATOR,
    BASELINE,
    DATA,
    FIGURE,
    LABEL,
    LINEAR,
    NEIGHBOURS,
    NETWORK,
    OURS,
    PAGE,
    SPLIT,
    STORE,
)

if TYPE_CHECKING:
    from .demo_results import Results

COLUMNS = {"accuracy": "accuracy", "macro_f1": "macro F1", "log_loss": "log loss"}

WHAT = """CellPatch is a neural network that describes a cell by 64 patches: learned tokens that \
attend over the genes which the cell expresses. This page shows what cellpatch-fast makes of it on \
a few cells: an annotator, which tells a cell's type.

The data: {cells} blood cells and {genes} genes that scanpy brings along (of 10x Genomics' 68,000 \
PBMCs), log-normalised. Their {types} types come from a comparison with sorted cells, not from an \
expert's eye. Neighbouring types, of T cells above all, overlap, and no method tells all of them."""

DONE = """A quarter of every type, {test} cells, was set aside to test on. Nothing was learnt from \
them and nothing chosen by them, and all results below are theirs alone. From the other {train} \
cells all methods learn:

{ours} was trained with the settings that so few cells get by default: the network starts from \
their principal components; two linear models (logistic regressions) of all genes stand beside it; \
a tenth of the cells says how to mix the three, and how sure to be.

The baseline, {baseline}, is scikit-learn's, with an L2 penalty that cross-validation chooses.

Left out: pretraining, on cells without labels. It is what a foundation model is about, but on \
these few cells it did not pay: within the training cells, networks with it were no better than \
without. With many cells it comes first, see the end of this page."""

CAME_OUT = """One test cell is {cell:.1%} of accuracy, and the standard error of an accuracy is \
about {error:.3f}: smaller differences mean little. {only_ours} test cells were told right by \
CellPatch only, {only_baseline} by the baseline only. A lower log loss is a better probability.

Which part delivers it: on so few cells, the linear models, which are close kin to the baseline. \
The network alone is less accurate; what it adds is the embedding below."""

EMBEDDING = """What the network makes of a cell, 64 patches in one row, for scanpy.pp.neighbors \
and all that follows. Test cells are coloured; grey are the cells that the annotator learnt from.

Let the {k} nearest training cells of each test cell vote, by the embedding alone: they are right \
on {neighbours:.1%} of the test cells. In 50 principal components of the same cells, the usual \
choice without a model, it is {components:.1%}."""

SPEED = """On this machine's CPU. The annotator labels and embeds {speed:,.0f} cells per second, \
from the first cell read to the last one written."""

NEXT = """Everything lies in {folder}: {data} holds the data, {annotator}/ the annotator, \
{store} the annotated cells: anndata.read_zarr("{store}").obs["cellpatch_label"].

Annotate your own cells of the same kind:
cellpatch annotate cells.h5ad --model {annotator} --output my-cells.zarr

Make an annotator from your own labels:
cellpatch finetune cells.h5ad --label COLUMN --output my-annotator

Pretrain first, where there are many cells, labelled or not:
cellpatch pretrain atlas.h5ad --output pretrained
cellpatch finetune cells.h5ad --label COLUMN --model pretrained --output my-annotator"""


def summary(results: Results) -> pd.DataFrame:
    """Scores on the test cells, a row for each that annotates."""
    rows = results.evaluations
    return pd.DataFrame(
        {title: [getattr(row, name) for row in rows.values()] for name, title in COLUMNS.items()},
        index=pd.Index(list(rows)),
    )


def speeds(results: Results) -> pd.DataFrame:
    """Seconds of each step, as text."""
    seconds = {step: f"{taken:,.1f} s" for step, taken in results.seconds.items()}
    table = pd.DataFrame({"seconds": seconds})
    table.attrs["numbers"] = True
    return table


def write_results(output: Path, results: Results) -> None:
    """Write the page and the UMAP to ``output``."""
    sections = [
        Section("What this is", WHAT.format(**_sizes(results))),
        Section("What was done", DONE.format(**_sizes(results), ours=OURS, baseline=BASELINE)),
        _came_out(results),
        _types(results),
        _embedding(output, results),
        Section(
            "How fast",
            SPEED.format(speed=results.speed),
            tables={"Seconds of each step": speeds(results)},
            figures={"The network's training": output / ANNOTATOR / "training_curves.svg"},
        ),
        Section(
            "What next",
            NEXT.format(folder=output.name, data=DATA, annotator=ANNOTATOR, store=STORE),
        ),
    ]
    write_page(output / PAGE, "CellPatch on 700 blood cells", sections)


def _sizes(results: Results) -> dict[str, int]:
    obs = results.data.obs
    test = int((obs[SPLIT] == "test").sum())
    cells, genes = results.data.shape
    types = obs[LABEL].nunique()
    return {"cells": cells, "genes": genes, "types": types, "test": test, "train": cells - test}


def _came_out(results: Results) -> Section:
    ours = results.evaluations[OURS]
    right, baseline_right = (results.right[name] for name in (OURS, BASELINE))
    text = CAME_OUT.format(
        cell=1 / ours.cells,
        error=np.sqrt(ours.accuracy * (1 - ours.accuracy) / ours.cells),
        only_ours=(right & ~baseline_right).sum(),
        only_baseline=(baseline_right & ~right).sum(),
    )
    return Section(f"What came out on {ours.cells} test cells", text, tables={"": summary(results)})


def _types(results: Results) -> Section:
    """Which types are told, and which are taken for which."""
    figures = {
        f"{name[0].upper()}{name[1:]}: truth and prediction, on test cells": pl.confusion_matrix(
            results.evaluations[name]
        )
        for name in (OURS, BASELINE)
    }
    return Section("Each type", figures=figures, tables={"F1 on test cells": _per_type(results)})


def _per_type(results: Results) -> pd.DataFrame:
    """F1 of each type, and how many test cells it has."""
    ours = results.evaluations[OURS].per_class
    table = {
        name: results.evaluations[name].per_class["f1"].reindex(ours.index)
        for name in (OURS, NETWORK, LINEAR, BASELINE)
    }
    return pd.DataFrame({"test cells": ours["cells"]} | table)


def _embedding(output: Path, results: Results) -> Section:
    cells = results.annotated.copy()
    truth, predicted = "test cells: true type", "test cells: predicted type"
    cells.obs[truth], cells.obs[predicted] = cells.obs[LABEL], cells.obs["cellpatch_label"]
    figure = pl.embedding(
        cells,
        color=[truth, predicted],
        highlight=(cells.obs[SPLIT] == "test").to_numpy(),
        save=output / FIGURE,
    )
    text = EMBEDDING.format(
        k=NEIGHBOURS, neighbours=results.neighbours, components=results.components
    )
    return Section("The embedding", text, {"UMAP; grey: training cells": figure})
