"""How good it is: ``python bench/quality.py [--data DIR] [--seeds 5] [--output FILE.json]``.

On scanpy's pbmc68k_reduced, and on the data sets of `FILES` where a folder holds them:

- Annotation from scratch, and after pretraining on the training cells without their labels, against
  logistic regression on 50 principal components of 2,000 variable genes: all three learn from the
  same cells and are tested on the same others.
- Pretraining: how well it tells hidden values of cells that it has not seen, against each gene's
  mean; and how many of a cell's 15 nearest neighbours in the embedding share its label, before and
  after.
- Whether the fast path's loss curves are the reference's, but for rounding.

One recipe, that for few cells, serves all data sets; it was chosen on parts of pbmc68k_reduced that
were split otherwise. Nothing is chosen within a run: training ends after a fixed number of epochs,
and the last model is the one that is tested. Runs that are kept (``--folder``) are not made again.
Prints Markdown and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import curves
from bench.machine import processor
from bench.report import table
from cellpatch_fast import CellLoader, CellPatch, CellPatchConfig, GeneVocabulary, tl
from cellpatch_fast.model import MaskedGeneModel
from cellpatch_fast.training import (
    FinetuningSettings,
    PretrainingSettings,
    evaluate,
    finetune,
    pretrain,
)

FILES = {"pbmc3k_annotated": "cell_type", "sc_mixology": "cell_line"}  # and what their labels are
TEST = 0.2  # share of cells
COMPONENTS, VARIABLE_GENES, NEIGHBOURS = 50, 2000, 15
MASKS = 20  # drawn of every training cell to find each gene's mean
CURVE_STEPS, CURVE_PATCHES = 200, 16


@dataclass(frozen=True)
class Recipe:
    """How models are made and trained, whatever the data. There are no validation cells."""

    config: CellPatchConfig
    pretraining: PretrainingSettings
    finetuning: FinetuningSettings

    def with_seed(self, seed: int) -> Recipe:
        return Recipe(
            self.config,
            replace(self.pretraining, seed=seed),
            replace(self.finetuning, seed=seed),
        )


RECIPE = Recipe(
    CellPatchConfig.for_few_cells(),
    PretrainingSettings.for_few_cells(validation=0),
    FinetuningSettings.for_few_cells(validation=0),
)
TOY = Recipe(
    replace(RECIPE.config, patches=3, dim=14, self_attention_blocks=1),
    replace(RECIPE.pretraining, epochs=1),
    replace(RECIPE.finetuning, epochs=1),
)
TOY_CELLS = 130


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled cells: ``X`` holds counts or log-normalised values, obs[``label``] the types."""

    name: str
    cells: anndata.AnnData
    label: str

    @property
    def labels(self) -> np.ndarray:
        """object [cells]"""
        return self.cells.obs[self.label].to_numpy(object)

    @property
    def vocabulary(self) -> GeneVocabulary:
        """Of these genes alone: steps are faster, and others would learn nothing."""
        return GeneVocabulary([], []).add(list(self.cells.var_names))

    def some(self, number: int) -> Dataset:
        """The first cells alone, of types that have ten of them."""
        cells = self.cells[:number]
        common = cells.obs[self.label].value_counts().loc[lambda counts: counts >= 10].index
        return replace(self, cells=cells[cells.obs[self.label].isin(common)].copy())


def read_datasets(folder: Path | None) -> list[Dataset]:
    """pbmc68k_reduced, and those of `FILES` that are in the folder."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bundled file is old, and scanpy says so
        bundled = scanpy.datasets.pbmc68k_reduced()
    cells = bundled.raw.to_adata()
    cells.obs = bundled.obs[["bulk_labels"]].copy()
    found = [Dataset("pbmc68k_reduced", cells, "bulk_labels")]
    for name, label in FILES.items():
        if folder is not None and (folder / f"{name}.h5ad").exists():
            found.append(Dataset(name, anndata.read_h5ad(folder / f"{name}.h5ad"), label))
    return found


def split(data: Dataset, seed: int) -> np.ndarray:
    """``"train"`` or ``"test"`` for each cell, object [cells]: a share of every type."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(data.cells.n_obs)
    _, test = train_test_split(rows, test_size=TEST, stratify=data.labels, random_state=seed)
    parts = np.full(len(rows), "train", object)
    parts[test] = "test"
    return parts


def logistic_regression(data: Dataset, parts: np.ndarray) -> dict[str, float]:
    """The usual way: variable genes, scaling, principal components, all from training cells."""
    import scanpy
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    cells = data.cells.copy()
    if data.name in FILES:  # counts
        scanpy.pp.normalize_total(cells, target_sum=1e4)
        scanpy.pp.log1p(cells)
    training = cells[parts == "train"].copy()
    scanpy.pp.highly_variable_genes(training, n_top_genes=min(VARIABLE_GENES, cells.n_vars))
    cells = cells[:, training.var["highly_variable"].to_numpy()]
    x, y = cells.X.toarray(), data.labels
    model = make_pipeline(
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": None, "a_max": 10.0}),  # scanpy.pp.scale's
        PCA(COMPONENTS, random_state=0),
        LogisticRegression(max_iter=2000),
    ).fit(x[parts == "train"], y[parts == "train"])
    found = evaluate(y[parts == "test"], model.predict(x[parts == "test"]), list(model.classes_))
    return {"accuracy": found.accuracy, "macro F1": found.macro_f1}


def annotation(
    data: Dataset, parts: np.ndarray, folder: Path, settings: FinetuningSettings, **start: Any
) -> dict[str, float]:
    """Accuracy and macro F1 on the test cells of an annotator that starts from a model, or anew."""
    cells = data.cells.copy()
    cells.obs["part"] = parts
    options: dict[str, Any] = {"label": data.label, "split_column": "part", "settings": settings}
    found = finetune(cells, folder, **options, **start).test
    assert found is not None  # there are test cells
    return {"accuracy": found.accuracy, "macro F1": found.macro_f1}


def targets(
    data: Dataset, rows: np.ndarray, settings: PretrainingSettings, model: CellPatch, epochs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What masks ask for of some cells, and what a model says.

    Returns
    -------
    tuple
        Gene tokens int [targets], true values and predictions float64 [targets]: hidden values and
        sampled zeros alike, of ``epochs`` masks per cell. Without a decoder predictions are 0.
    """
    genes, values, predictions = [], [], []
    with CellLoader(
        data.cells,
        model.vocabulary,
        model.config,
        rows=rows,
        masking=settings.masking,
        seed=settings.seed,
        batch_size=64,
    ) as loader:
        for _ in range(epochs):
            for batch in loader:
                assert batch.targets is not None
                genes.append(batch.targets.genes.numpy())
                values.append(batch.targets.values.double().numpy())
                if isinstance(model, MaskedGeneModel):
                    with torch.inference_mode():
                        predictions.append(model.predict(batch.cells, batch.targets).numpy())
    told = np.concatenate(predictions, dtype=np.float64) if predictions else np.zeros(0)
    return np.concatenate(genes), np.concatenate(values), told


def reconstruction(
    data: Dataset, parts: np.ndarray, model: MaskedGeneModel, settings: PretrainingSettings
) -> dict[str, float]:
    """Mean squared error on the test cells: the model's, and of predicting each gene's mean.

    The mean is over all that masks ask for of a gene in the training cells, hidden values and
    sampled zeros alike, as these are what the model learns from. A gene that they never ask for
    gets the mean over all genes.
    """
    model.eval()
    training, test = (np.flatnonzero(parts == part) for part in ("train", "test"))
    encoder_only = CellPatch(model.config, model.vocabulary)
    genes, values, _ = targets(data, training, settings, encoder_only, MASKS)
    asked = np.bincount(genes, minlength=model.vocabulary.size)
    total = np.bincount(genes, values, minlength=model.vocabulary.size)
    means = np.where(asked > 0, total / np.maximum(asked, 1), values.mean())
    genes, values, told = targets(data, test, settings, model, 1)
    return {
        "error": float(np.square(told - values).mean()),
        "error of means": float(np.square(means[genes] - values).mean()),
    }


def neighbour_agreement(data: Dataset, model: CellPatch) -> dict[str, float]:
    """Share of a cell's nearest neighbours in the embedding that have its label, over all cells."""
    from sklearn.neighbors import NearestNeighbors

    found = {}
    for pool in ("flatten", "mean"):
        embedded = tl.embed(data.cells, model.eval(), pool=pool, copy=True, progress=False)
        assert embedded is not None  # with copy=True
        rows = embedded.obsm["X_cellpatch"]
        search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(rows)
        nearest = search.kneighbors(rows, return_distance=False)[:, 1:]  # the first is the cell
        found[pool] = float((data.labels[nearest] == data.labels[:, None]).mean())
    return found


def measure(
    data: Dataset, seed: int, folder: Path, recipe: Recipe, *, pretraining: bool = True
) -> dict[str, Any]:
    """Everything about one data set with one split; without what needs ``pretraining``, if so."""
    parts, vocabulary = split(data, seed), data.vocabulary
    recipe = recipe.with_seed(seed)
    config = replace(recipe.config, max_genes=vocabulary.size)
    begin: dict[str, Any] = {"config": config, "vocabulary": vocabulary}
    found: dict[str, Any] = {
        "logistic regression": logistic_regression(data, parts),
        "from scratch": annotation(data, parts, folder / "scratch", recipe.finetuning, **begin),
    }
    if not pretraining:
        return found
    torch.manual_seed(seed)
    untrained = MaskedGeneModel(config, vocabulary)
    training_cells = data.cells[parts == "train"].copy()
    pretrain(training_cells, folder / "pretrained", settings=recipe.pretraining, **begin)
    pretrained = MaskedGeneModel.from_pretrained(folder / "pretrained")
    return found | {
        "pretrained": annotation(
            data, parts, folder / "annotator", recipe.finetuning, model=pretrained
        ),
        "reconstruction": reconstruction(data, parts, pretrained, recipe.pretraining),
        "neighbours before": neighbour_agreement(data, untrained),
        "neighbours after": neighbour_agreement(data, pretrained),
    }


def median(found: Sequence[Any]) -> Any:
    """The median of each number in dictionaries of dictionaries, of those that have it."""
    if isinstance(found[0], dict):
        return {name: median([each[name] for each in found if name in each]) for name in found[0]}
    return float(np.median(found))


def loss_curves(data: Dataset, steps: int, folder: Path, recipe: Recipe) -> dict[str, Any]:
    vocabulary = data.vocabulary
    config = replace(recipe.config, max_genes=vocabulary.size, patches=CURVE_PATCHES)
    trainings = recipe.pretraining, recipe.finetuning
    return curves.compare(data.cells, data.label, vocabulary, config, *trainings, steps, folder)


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{results['date']}; medians of {results['seeds']} seeds"
    ]
    methods = ("logistic regression", "from scratch", "pretrained")
    body = []
    for name, found in results["data"].items():
        pretrained = sum("pretrained" in seed for seed in found["seeds"])
        for measure_name in ("accuracy", "macro F1"):
            values = [found["median"][method][measure_name] for method in methods]
            row = [f"{name}, {measure_name}", *(f"{value:.3f}" for value in values)]
            body.append([*row, str(pretrained)])
    lines += table(["annotation of test cells", *methods, "seeds of pretrained"], body)
    body = []
    for name, found in results["data"].items():
        error, means = found["median"]["reconstruction"].values()
        before, after = (found["median"][f"neighbours {when}"] for when in ("before", "after"))
        shares = [f"{x[pool]:.3f}" for pool in ("flatten", "mean") for x in (before, after)]
        body.append([name, f"{means:.3f}", f"{error:.3f}", *shares])
    header = ["pretraining", "error of means", "error"]
    header += [
        f"neighbours, {pool}, {x}" for pool in ("flatten", "mean") for x in ("before", "after")
    ]
    lines += table(header, body)
    kinds = results["curves"]
    body = [
        [name, *(f"{found[name]:,.3g}" for found in kinds.values())]
        for name in next(iter(kinds.values()))
    ]
    lines += table(["loss curves", *kinds], body)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="few steps, to see that it works")
    parser.add_argument("--data", type=Path, help="folder with further data sets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--pretrained",
        type=int,
        nargs="+",
        help="pretrain so many of the seeds, for each data set in turn; all without it",
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the runs here; go on where there are some"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    recipe, seeds, steps = (TOY, 1, 20) if options.toy else (RECIPE, options.seeds, CURVE_STEPS)
    datasets = read_datasets(options.data)
    if options.pretrained and (
        min(options.pretrained) < 1 or len(options.pretrained) != len(datasets)
    ):
        names = ", ".join(dataset.name for dataset in datasets)
        parser.error(f"--pretrained takes a number of seeds, 1 at least, for each of {names}")
    if options.toy:
        datasets = [dataset.some(TOY_CELLS) for dataset in datasets]
    data: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        loss = loss_curves(datasets[0], steps, folder / "curves", recipe)
        for number, dataset in enumerate(datasets):
            found = []
            for seed in range(seeds):
                run = folder / dataset.name / str(seed)
                pretraining = options.pretrained is None or seed < options.pretrained[number]
                found.append(measure(dataset, seed, run, recipe, pretraining=pretraining))
                print(f"{dataset.name}, seed {seed}: {json.dumps(found[-1])}", file=sys.stderr)
            data[dataset.name] = {"median": median(found), "seeds": found}
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "toy": options.toy,
        "seeds": seeds,
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "recipe": {
            "config": recipe.config.to_dict(),
            "pretraining": recipe.pretraining.to_dict(),
            "fine-tuning": recipe.finetuning.to_dict(),
        },
        "data": data,
        "curves": loss,
    }
    print(report(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
