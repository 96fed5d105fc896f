"""Every method that the benchmark of quality compares: it learns from the training cells of a
split and is tested on the others.

One recipe for few cells serves all data sets. Nothing is chosen on test cells: training ends after
a number of epochs that the number of training cells decides, and the last model is tested.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import quality_baselines
from bench.quality_baselines import Predicted
from bench.quality_data import Split
from bench.quality_pretraining import neighbour_agreement, reconstruction
from cellpatch_fast import CellPatch, CellPatchConfig, tl
from cellpatch_fast.model import CellPatchAnnotator, MaskedGeneModel
from cellpatch_fast.training import (
    Evaluation,
    FinetuningSettings,
    PretrainingSettings,
    evaluate,
    finetune,
    pretrain,
)

NETWORK, BOTH = "CellPatch, network alone", "CellPatch, with the linear path"
UNTRAINED, PAPERS = "CellPatch, untrained", "CellPatch, the paper's recipe"
REFERENCES = (UNTRAINED, PAPERS)  # which take most time, and are in nobody's way
UNMOVED = 1e-12  # a learning rate that changes no weight
Score = dict[str, Any]  # accuracy, macro F1 and seconds, and what else a method has to say


@dataclass(frozen=True)
class Recipe:
    """What differs from the package's recipes for few cells, and from the paper's.

    Parameters
    ----------
    sizes
        Of models: fields of `CellPatchConfig`.
    training
        Fields of `TrainingSettings`.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def start(self, split: Split) -> dict[str, Any]:
        """Configuration and vocabulary of a new model for few cells."""
        vocabulary = split.data.vocabulary
        config = CellPatchConfig.for_few_cells(max_genes=vocabulary.size, **self.sizes)
        return {"config": config, "vocabulary": vocabulary}

    def papers_start(self, split: Split) -> dict[str, Any]:
        vocabulary = split.data.vocabulary
        config = CellPatchConfig(max_genes=vocabulary.size, **self.sizes)
        return {"config": config, "vocabulary": vocabulary}

    def finetuning(self, split: Split, **changes: Any) -> FinetuningSettings:
        """Some of the training cells are kept apart: they weigh the network and linear models."""
        fields = {"seed": split.seed, **self.training, **changes}
        return FinetuningSettings.for_few_cells(int(split.training.sum()), **fields)

    def papers_finetuning(self, split: Split) -> FinetuningSettings:
        """All cells are trained on, so that none can tell when to stop."""
        fields: dict[str, Any] = {"validation": 0, "patience": 0, "seed": split.seed}
        fields |= {"spectral": False, "whitened": False, "linear": False}
        return FinetuningSettings(**fields | dict(self.training))

    def pretraining(self, split: Split) -> PretrainingSettings:
        fields = {"validation": 0, "seed": split.seed, **self.training}
        return PretrainingSettings.for_few_cells(int(split.training.sum()), **fields)


FULL = Recipe()
TOY = Recipe({"patches": 3, "dim": 14, "self_attention_blocks": 1}, {"epochs": 1, "batch_size": 16})
Method = Callable[[Split, Recipe, Path], Score]


def fine_tuned(split: Split, recipe: Recipe, folder: Path) -> Score:
    """With the linear path; under `NETWORK` the score of the same network without it."""
    begin = recipe.start(split)
    score = annotation(split, folder, settings=recipe.finetuning(split), **begin)
    annotator = CellPatchAnnotator.from_pretrained(folder)
    assert annotator.linear is not None
    score["shares"] = annotator.linear.shares.tolist()
    annotator.linear = None
    cells = tl.annotate(
        split.data.cells[~split.training].copy(), annotator, copy=True, progress=False
    )
    assert cells is not None  # with copy=True
    predicted = Predicted(cells.obs["cellpatch_label"].to_numpy(object))
    return score | {NETWORK: tested(split, predicted)}


def papers_recipe(split: Split, recipe: Recipe, folder: Path) -> Score:
    settings = recipe.papers_finetuning(split)
    return annotation(split, folder, settings=settings, **recipe.papers_start(split))


def untrained(split: Split, recipe: Recipe, folder: Path) -> Score:
    """Logistic regression on the features of a model that has only been started."""
    features = embedded(split, started(split, recipe, folder))
    parts = features[split.training], features[~split.training]
    return tested(split, quality_baselines.regress(*quality_baselines.standardised(*parts), split))


def pretrained(split: Split, recipe: Recipe, folder: Path) -> Score:
    """Pretrained on the training cells without their labels, then fine-tuned with them.

    The score also says what pretraining alone came to. Its seconds are of both trainings.
    """
    begin, settings = recipe.start(split), recipe.pretraining(split)
    before = time.process_time()
    cells = split.data.cells[split.training].copy()
    pretrain(cells, folder / "pretrained", settings=settings, **begin)
    model = MaskedGeneModel.from_pretrained(folder / "pretrained")
    score = annotation(split, folder / "annotator", settings=recipe.finetuning(split), model=model)
    score["seconds"] = time.process_time() - before
    torch.manual_seed(split.seed)
    models = {
        "random": CellPatch(**begin),
        "started": started(split, recipe, folder / "started"),
        "pretrained": model,
    }
    neighbours = {name: neighbour_agreement(split.data, each) for name, each in models.items()}
    return score | {
        "reconstruction": reconstruction(split, model, settings),
        "neighbours": neighbours,
    }


def annotation(split: Split, folder: Path, **how: Any) -> Score:
    """Of an annotator that is trained as `finetune` is told."""
    cells = split.data.cells.copy()
    cells.obs["part"] = split.parts
    evaluation = finetune(cells, folder, label=split.data.label, split_column="part", **how).test
    assert evaluation is not None  # there are test cells
    return scored(split, evaluation)


def started(split: Split, recipe: Recipe, folder: Path) -> CellPatch:
    """The encoder that fine-tuning starts from: chosen from the cells, without their labels."""
    settings = recipe.finetuning(split, guided=False, linear=False, epochs=1, learning_rate=UNMOVED)
    annotation(split, folder, settings=settings, **recipe.start(split))
    return CellPatch.from_pretrained(folder)


def embedded(split: Split, model: CellPatch) -> np.ndarray:
    """The patch features of all cells, float64 [cells, patches x output_dim]."""
    embedded = tl.embed(split.data.cells, model.eval(), copy=True, progress=False)
    assert embedded is not None  # with copy=True
    return embedded.obsm["X_cellpatch"].astype(np.float64)


def of_cells(predict: Callable[[Split], Predicted]) -> Method:
    """A baseline, which needs neither recipe nor folder, as a method."""

    def method(split: Split, recipe: Recipe, folder: Path) -> Score:
        return tested(split, predict(split))

    return method


def tested(split: Split, predicted: Predicted) -> Score:
    truth = split.data.labels
    evaluation = evaluate(truth[~split.training], predicted.labels, sorted(set(truth)))
    strength = {} if predicted.strength is None else {"C": predicted.strength}
    return scored(split, evaluation) | strength


def scored(split: Split, evaluation: Evaluation) -> Score:
    assert evaluation.cells == np.sum(~split.training)  # all methods are tested on the same cells
    return {"accuracy": evaluation.accuracy, "macro F1": evaluation.macro_f1}


LINEAR: dict[str, Method] = {
    "logistic regression, 50 components": of_cells(quality_baselines.components),
    "logistic regression, all genes": of_cells(quality_baselines.all_genes),
    "logistic regression, all genes, scaled": of_cells(quality_baselines.scaled_genes),
}
ANNOTATION: dict[str, Method] = LINEAR | {
    UNTRAINED: untrained,
    BOTH: fine_tuned,
    PAPERS: papers_recipe,
}
PRETRAINED: dict[str, Method] = {"CellPatch, pretrained": pretrained}
METHODS = ANNOTATION | PRETRAINED
