"""``cellpatch demo``: the whole path on scanpy's bundled blood cells, offline.

Pretrain on all cells without their labels, fine-tune on some with them, annotate all, and compare
the annotation of the test cells with what logistic regression makes of the same split. All of it
through the public functions, as a user would call them.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError
from .io.partial import LOCK, partial_of

if TYPE_CHECKING:
    from anndata import AnnData

    from .training import Evaluation, FinetuningSettings, PretrainingSettings

DATA, PRETRAINED, ANNOTATOR = "pbmc68k.h5ad", "pretrained", "annotator"
STORE, FIGURE, PAGE = "annotated.zarr", "umap", "index.html"
PARTS = {DATA, PRETRAINED, ANNOTATOR, STORE, f"{FIGURE}.png", f"{FIGURE}.svg", PAGE}
LABEL, SPLIT = "bulk_labels", "split"
SEED = 0
BASELINE = "logistic regression on 50 principal components"


def pretraining() -> PretrainingSettings:
    """Briefly: just beyond the plateau of predicting each gene's mean."""
    from .training import PretrainingSettings

    return PretrainingSettings.for_few_cells(epochs=10, validation=0.1, seed=SEED)


def finetuning() -> FinetuningSettings:
    from .training import FinetuningSettings

    return FinetuningSettings.for_few_cells(seed=SEED)


def run_demo(output: Path) -> None:
    """Write data, models, the annotated embedding and a page of results to ``output``.

    Raises
    ------
    InputError
        If the extra ``analysis`` is not installed, or ``output`` holds something else.
    """
    _require_own(output)
    cells = _blood_cells()
    from . import atlas
    from .config import CellPatchConfig
    from .training import finetune, pretrain

    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    data = output / DATA
    cells.write_h5ad(data)
    print(f"{data}: {cells.n_obs} blood cells x {cells.n_vars} genes, log-normalised", flush=True)

    print("\nPretraining, without labels:", flush=True)
    pretrain(
        data,
        output / PRETRAINED,
        config=CellPatchConfig.for_few_cells(),
        settings=pretraining(),
        add_genes=True,
        device="cpu",
        overwrite=True,
    )
    print("\nFine-tuning, with the labels of the training cells:", flush=True)
    done = finetune(
        data,
        output / ANNOTATOR,
        label=LABEL,
        model=output / PRETRAINED,
        settings=finetuning(),
        split_column=SPLIT,
        device="cpu",
        overwrite=True,
    )
    assert done.test is not None  # the split has test cells
    print("\nAnnotating all cells:", flush=True)
    atlas.annotate(data, output / ANNOTATOR, output / STORE, overwrite=True)
    baseline = _baseline(cells)
    agreement = _write_page(output, done.test, baseline)
    print(f"\ntest cells, CellPatch: {done.test}")
    print(f"test cells, {BASELINE}: {baseline}")
    print(f"of 15 nearest neighbours in the embedding, {agreement:.0%} have the same type")
    print(f"\n{output / PAGE} shows it all ({time.perf_counter() - started:.0f} s)")
    print(f"Next: adata = anndata.read_zarr({str(output / STORE)!r}); adata.obs['cellpatch_label']")


def _require_own(output: Path) -> None:
    """Refuse a folder that holds anything but an earlier demo, whose parts are written anew."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: choose another --output")
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    known = PARTS | {partial_of(Path(STORE)).name, LOCK}
    if found and (DATA not in found or found - known):
        raise InputError(f"{output} holds other files than a demo's: choose another --output")


def _blood_cells() -> AnnData:
    """700 cells with labels, and a split into training, validation and test cells."""
    try:
        import scanpy
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("the demo needs scanpy: pip install 'cellpatch-fast[analysis]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bundled file is old, and scanpy says so
        bundled = scanpy.datasets.pbmc68k_reduced()
    cells = bundled.raw.to_adata()
    cells.obs = bundled.obs[[LABEL]].copy()
    split = np.full(cells.n_obs, "train", object)
    others = train_test_split(
        np.arange(cells.n_obs), test_size=0.25, stratify=cells.obs[LABEL], random_state=SEED
    )[1]
    split[others] = "validation"
    test = train_test_split(
        others, test_size=0.6, stratify=cells.obs[LABEL].iloc[others], random_state=SEED
    )[1]
    split[test] = "test"
    cells.obs[SPLIT] = split
    del cells.uns
    return cells


def _baseline(cells: AnnData) -> Evaluation:
    """Logistic regression, fitted on training cells, evaluated on test cells."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from .training import evaluate

    expression, labels = cells.X.toarray(), cells.obs[LABEL].astype(str).to_numpy()
    training, test = (cells.obs[SPLIT].to_numpy() == part for part in ("train", "test"))
    model = make_pipeline(
        StandardScaler(), PCA(50, random_state=SEED), LogisticRegression(max_iter=2_000)
    )
    model.fit(expression[training], labels[training])
    return evaluate(labels[test], model.predict(expression[test]), np.unique(labels).tolist())


def _write_page(output: Path, test: Evaluation, baseline: Evaluation) -> float:
    """The page of results; returns the agreement of neighbours in the embedding."""
    import anndata
    import pandas as pd

    from . import pl
    from .reports import Section, write_page

    annotated = anndata.read_zarr(output / STORE)
    agreement = _neighbour_agreement(annotated)
    figure = pl.embedding(annotated, color=[LABEL, "cellpatch_label"], save=output / FIGURE)
    names = {"accuracy": "accuracy", "macro_f1": "macro F1"}
    table = pd.DataFrame(
        {name: [getattr(x, field) for x in (test, baseline)] for field, name in names.items()},
        index=["CellPatch, pretrained and fine-tuned", BASELINE],
    ).round(3)
    run = output / ANNOTATOR
    write_page(
        output / PAGE,
        "CellPatch on 700 blood cells",
        [
            Section(
                "Test cells",
                f"{test.cells} cells that took no part in training. With so few, one cell is "
                f"{1 / test.cells:.1%} of the accuracy.",
                tables={"": table},
                figures={"Truth and prediction": run / "confusion.svg"},
            ),
            Section("Each type", tables={"": test.per_class.round(3)}),
            Section(
                "All cells",
                f"Of each cell's 15 nearest neighbours in the embedding, {agreement:.0%} have its "
                f"type ({_chance(annotated):.0%} by chance).",
                figures={"UMAP of the embedding, by type and by predicted type": figure},
            ),
            Section(
                "Training",
                figures={
                    "Fine-tuning": run / "training_curves.svg",
                    "Pretraining": pl.training_curves(output / PRETRAINED),
                },
            ),
        ],
    )
    return agreement


def _neighbour_agreement(annotated: AnnData) -> float:
    """Share of the 15 nearest neighbours that have the same label, over all cells."""
    from sklearn.neighbors import NearestNeighbors

    rows, labels = annotated.obsm["X_cellpatch"], annotated.obs[LABEL].to_numpy()
    nearest = NearestNeighbors(n_neighbors=16).fit(rows).kneighbors(rows, return_distance=False)
    return float((labels[nearest[:, 1:]] == labels[:, None]).mean())


def _chance(annotated: AnnData) -> float:
    """Share of pairs of cells with the same label."""
    return float((annotated.obs[LABEL].value_counts(normalize=True) ** 2).sum())
