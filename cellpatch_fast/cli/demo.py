"""``cellpatch demo``: the whole path on scanpy's bundled blood cells, offline.

Fine-tune on some cells with their labels, annotate all, and compare what comes out on the test
cells with logistic regression, which learns from the same cells. All of it through the public
functions, with the settings that they choose themselves, as a user would call them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..errors import InputError
from ..io.stores.partial import LOCK, partial_of
from .demo_results import (
    ANNOTATOR,
    BASELINE,
    DATA,
    LABEL,
    LINEAR,
    NEIGHBOURS,
    NETWORK,
    OURS,
    PAGE,
    PARTS,
    SPLIT,
    STORE,
    Results,
)

if TYPE_CHECKING:
    from anndata import AnnData

    from ..atlas import Annotated
    from ..training import Evaluation, FinetuningSettings

SEED = 0
TEST_SHARE = 0.25
PENALTIES = tuple(10.0**power for power in range(-4, 3))  # C, that the baseline chooses from
FOLDS = 5

T = TypeVar("T")


def finetuning() -> FinetuningSettings | Mapping[str, object]:
    """What a new user gets: for 700 cells, the settings for few cells."""
    return {"seed": SEED}


def run_demo(output: Path) -> None:
    """Write data, the annotator, annotated cells and a page of results to ``output``.

    Raises
    ------
    InputError
        If the extra ``analysis`` is not installed, or ``output`` holds something else.
    """
    _require_own(output)
    from .demo_page import speeds, summary, write_results

    clock = _Clock()
    data = clock.time("read and split the cells", _blood_cells)
    output.mkdir(parents=True, exist_ok=True)
    data.write_h5ad(output / DATA)
    test = int((data.obs[SPLIT] == "test").sum())
    print(
        f"{output / DATA}: {data.n_obs} blood cells x {data.n_vars} genes; {test} of them are kept "
        f"apart to test on\n\nFine-tuning a new model on the other {data.n_obs - test}:",
        flush=True,
    )
    results = _results(output, data, clock)
    clock.time("draw this page", lambda: write_results(output, results))
    table = summary(results).to_string(float_format="{:.3f}".format, na_rep="-")
    print(f"\nOn the {test} test cells:\n{table}")
    print(
        f"\n{NEIGHBOURS} nearest training cells in the embedding, voting: accuracy "
        f"{results.neighbours:.3f} (in 50 principal components: {results.components:.3f})"
    )
    print(f"\nHow long it took:\n{speeds(results).to_string(header=False)}")
    print(f"annotation of all cells: {results.speed:,.0f} cells/s")
    print(f"\nOpen {output / PAGE}: it shows and explains all of this.")
    print("Next, with labels of your own: cellpatch finetune CELLS --label COLUMN --output DIR")


class _Clock:
    """Seconds of each step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, step: str, do: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = do()
        self.seconds[step] = time.perf_counter() - started
        return result


def _results(output: Path, data: AnnData, clock: _Clock) -> Results:
    """Train, annotate, and compare."""
    import anndata

    from .. import atlas
    from ..training import finetune

    run = output / ANNOTATOR
    done = clock.time(
        "train the annotator, and test it",
        lambda: finetune(
            output / DATA,
            run,
            label=LABEL,
            settings=finetuning(),
            split_column=SPLIT,
            device="cpu",
            overwrite=True,
        ),
    )
    assert done.test is not None  # the split has test cells
    assert done.linear is not None
    print("\nAnnotating all cells, and comparing:", flush=True)
    annotation: Annotated = clock.time(
        "annotate all cells",
        lambda: atlas.annotate(output / DATA, run, output / STORE, device="cpu", overwrite=True),
    )
    baseline, right = clock.time(BASELINE, lambda: _baseline(data))
    annotated = anndata.read_zarr(output / STORE)
    _, test, labels = _parts(data)
    return Results(
        data,
        annotated,
        {
            OURS: done.test,
            NETWORK: _network(annotated, run),
            LINEAR: done.linear,
            BASELINE: baseline,
        },
        {OURS: (labels == annotated.obs["cellpatch_label"].astype(str))[test], BASELINE: right},
        _vote(annotated.obsm["X_cellpatch"], data),
        _vote(_principal_components(data), data),
        clock.seconds,
        annotation.summary.computed / annotation.summary.seconds,
    )


def _require_own(output: Path) -> None:
    """Refuse a folder that holds anything but an earlier demo, whose parts are written anew."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: choose another --output")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    ours = PARTS | {partial_of(Path(STORE)).name, LOCK}
    if names and (DATA not in names or names - ours):
        raise InputError(f"{output} holds other files than a demo's: choose another --output")


def _blood_cells() -> AnnData:
    """700 cells with labels, a quarter of every type to test on."""
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
    split[
        train_test_split(
            np.arange(cells.n_obs),
            test_size=TEST_SHARE,
            stratify=cells.obs[LABEL],
            random_state=SEED,
        )[1]
    ] = "test"
    cells.obs[SPLIT] = split
    del cells.uns
    return cells


def _parts(data: AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which cells are for training, and which for testing, bool [cells]; labels of all."""
    test = (data.obs[SPLIT] == "test").to_numpy()
    return ~test, test, data.obs[LABEL].astype(str).to_numpy()


def _baseline(data: AnnData) -> tuple[Evaluation, np.ndarray]:
    """Logistic regression on log-normalised values, its penalty cross-validated; nothing scaled.

    Also which of the test cells it tells right.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from threadpoolctl import threadpool_limits

    from ..training import evaluate

    training, test, labels = _parts(data)
    expression = data.X.toarray()
    model = GridSearchCV(
        LogisticRegression(max_iter=1_000),
        {"C": PENALTIES},
        scoring="neg_log_loss",
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=SEED),
    )
    with threadpool_limits(1, user_api="blas"):  # more are slower: these products are small
        model.fit(expression[training], labels[training])
    truth, predicted = labels[test], model.predict(expression[test])
    probabilities = model.predict_proba(expression[test])
    classes = model.classes_.tolist()
    return evaluate(truth, predicted, classes, probabilities=probabilities), truth == predicted


def _network(annotated: AnnData, run: Path) -> Evaluation:
    """What the annotator's network says, from the embedding, without the linear models."""
    import torch

    from ..model import CellPatchAnnotator
    from ..training import evaluate

    _, test, labels = _parts(annotated)
    annotator = CellPatchAnnotator.from_pretrained(run).eval()
    features = torch.from_numpy(annotated.obsm["X_cellpatch"][test])
    with torch.inference_mode():
        logits = annotator.head(features.unflatten(1, (annotator.config.patches, -1)))
        probabilities = torch.softmax(logits / annotator.config.temperature, 1).numpy()
    predicted = np.array(annotator.classes, object)[probabilities.argmax(1)]
    return evaluate(labels[test], predicted, annotator.classes, probabilities=probabilities)


def _principal_components(data: AnnData) -> np.ndarray:
    """float [cells, 50], found in the training cells."""
    from sklearn.decomposition import PCA

    expression = data.X.toarray()
    principal = PCA(50, random_state=SEED).fit(expression[_parts(data)[0]])
    scores: np.ndarray = principal.transform(expression)
    return scores


def _vote(rows: np.ndarray, data: AnnData) -> float:
    """Accuracy on test cells when the nearest training cells in ``rows`` vote for a type."""
    from sklearn.neighbors import KNeighborsClassifier

    training, test, labels = _parts(data)
    model = KNeighborsClassifier(NEIGHBOURS).fit(rows[training], labels[training])
    return float(model.score(rows[test], labels[test]))
