"""``cellpatch demo``: the whole path on scanpy's bundled blood cells, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .io.partial import partial_of

if TYPE_CHECKING:
    from anndata import AnnData

SEED = 0
DATA, MODEL, STORE = "pbmc68k.h5ad", "model", "embedding.zarr"


def run_demo(output: Path) -> None:
    """Write cells, a model and the embedding to ``output``, and say what they are.

    Raises
    ------
    InputError
        If the extra ``analysis`` is not installed, or ``output`` holds something else.
    """
    _require_own(output)
    cells = _blood_cells()
    import torch

    from . import atlas
    from .config import CellPatchConfig
    from .genes import GeneVocabulary
    from .model import CellPatch

    output.mkdir(parents=True, exist_ok=True)
    data, model, store = (output / name for name in (DATA, MODEL, STORE))
    cells.write_h5ad(data)
    print(f"{data}: {cells.n_obs} blood cells x {cells.raw.n_vars} genes, log-normalised in raw")
    torch.manual_seed(SEED)
    CellPatch(CellPatchConfig(), GeneVocabulary.human()).save_pretrained(model)
    print(f"{model}: a CellPatch model with the paper's configuration, untrained")
    print(atlas.embed(data, model, store, use_raw=True, overwrite=True))

    import anndata

    embedded = anndata.read_zarr(store)
    agreement = _neighbour_agreement(embedded)
    print(
        f"Of each cell's 15 nearest neighbours in the embedding, {agreement:.0%} have its cell "
        f"type ({_chance(embedded):.0%} by chance). The model is untrained: this is what its "
        "random patches keep of the expression."
    )
    print(f"\nNext: adata = anndata.read_zarr({str(store)!r}); adata.obsm['X_cellpatch']")


def _require_own(output: Path) -> None:
    """Refuse a folder that holds anything but an earlier demo, whose parts are written anew."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: choose another --output")
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if found and (DATA not in found or found - {DATA, MODEL, STORE, partial_of(Path(STORE)).name}):
        raise InputError(f"{output} holds other files than a demo's: choose another --output")


def _blood_cells() -> AnnData:
    try:
        import scanpy
    except ImportError as error:
        raise InputError("the demo needs scanpy: pip install 'cellpatch-fast[analysis]'") from error
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bundled file is old, and scanpy says so
        return scanpy.datasets.pbmc68k_reduced()


def _neighbour_agreement(embedded: AnnData) -> float:
    """Share of the 15 nearest neighbours that have the same label, over all cells."""
    from sklearn.neighbors import NearestNeighbors

    rows, labels = embedded.obsm["X_cellpatch"], embedded.obs["bulk_labels"].to_numpy()
    nearest = NearestNeighbors(n_neighbors=16).fit(rows).kneighbors(rows, return_distance=False)
    return float((labels[nearest[:, 1:]] == labels[:, None]).mean())


def _chance(embedded: AnnData) -> float:
    """Share of pairs of cells with the same label."""
    return float((embedded.obs["bulk_labels"].value_counts(normalize=True) ** 2).sum())
