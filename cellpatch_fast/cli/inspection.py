"""What a path holds, for ``cellpatch inspect``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, InputWarning
from ..io.stores.embeddings import ATTRIBUTE
from ..io.stores.partial import finished_facts, partial_of, unfinished_facts
from ..io.stores.tokens import KIND, TokenStore, is_token_store

if TYPE_CHECKING:
    from ..io.sources.source import CellSource


def describe(place: Path | str) -> dict[str, Any]:
    """Facts about a model directory, an AnnData file or one of our stores, in reading order.

    ``place`` is a path, or the address of a Zarr store.

    Raises
    ------
    InputError
        If there is nothing at ``place``, or nothing that we know.
    """
    if isinstance(place, Path):
        if journal := unfinished_facts(place if place.exists() else partial_of(place)):
            return _unfinished(journal)
        if (place / "config.json").is_file():
            return _model(place)
        if (facts := finished_facts(place, ATTRIBUTE)) is not None:
            return _embeddings(place, facts)
    if is_token_store(place):
        with TokenStore(place) as store:
            return {"kind": "token store"} | store.describe()
    from ..io.sources.source import open_source

    with open_source(place) as source:
        return {"kind": "cells"} | source.describe() | _usable(source)


def _model(path: Path) -> dict[str, Any]:
    from ..model import CellPatch, CellPatchAnnotator, MaskedGeneModel, fingerprint
    from ..model.storage import parts_of

    parts = parts_of(path)
    model: CellPatch
    if "head." in parts:
        model = CellPatchAnnotator.from_pretrained(path)
    else:
        model = (MaskedGeneModel if "decoder." in parts else CellPatch).from_pretrained(path)
    classes = {"classes": model.classes} if isinstance(model, CellPatchAnnotator) else {}
    return {
        "kind": f"{type(model).__name__} model",
        "genes": len(model.vocabulary),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": fingerprint(model),
        **{name: list(names) for name, names in classes.items()},
        **_run(path),
        **model.config.to_dict(),
        "gene rows": _gene_rows(model.vocabulary.tokens, model.config.max_genes),
    }


def _gene_rows(tokens: np.ndarray, rows: int) -> str:
    """Which rows of a gene embedding belong to genes."""
    free = np.ones(rows, bool)
    free[0] = False  # padding
    free[tokens] = False
    spare = np.flatnonzero(free)
    text = f"{rows:,}: row 0 for padding, {len(tokens):,} for genes"
    if not len(spare):
        return text
    bounds = np.flatnonzero(np.diff(spare) > 1) + 1
    stretches = [(part[0], part[-1]) for part in np.split(spare, bounds)]
    listed = [
        f"{first:,} to {last:,}" if last > first else f"{first:,}" for first, last in stretches[:3]
    ]
    listed += ["…"] if len(stretches) > 3 else []
    return f"{text}, {len(spare):,} spare ({', '.join(listed)}) for genes that are added"


def _run(path: Path) -> dict[str, Any]:
    """What is known of the training run whose folder the directory is."""
    from ..training.folder import SETTINGS, read_settings

    if not (path / SETTINGS).exists():
        return {}
    run = read_settings(path)
    versions = ", ".join(f"{name} {x}" for name, x in run["versions"].items() if x)
    data = run["settings"].get("data", [])
    return {"made by": run["kind"], "data": data, "versions": versions}


def _embeddings(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    import zarr

    described: dict[str, Any] = {"kind": "embedding store"}
    root = zarr.open_group(path, mode="r")
    for key, array in root["obsm"].arrays():  # type: ignore[union-attr]
        described["cells"] = array.shape[0]
        described[f"obsm/{key}"] = f"{array.shape[0]} x {array.shape[1]} {array.dtype}"
    described["obs_columns"] = root["obs"].attrs["column-order"]
    written_by = {"written by": f"cellpatch-fast {facts['version']}"}
    return described | facts["counts"] | facts["settings"] | written_by


def _unfinished(journal: dict[str, Any]) -> dict[str, Any]:
    done = journal["done"]
    return {
        "kind": f"unfinished {journal['kind']} (the command that began it finishes it)",
        "shards done": len(done["shards"] if journal["kind"] == KIND else done),
        **journal["settings"],
        "written by": f"cellpatch-fast {journal['version']}",
    }


def _usable(source: CellSource) -> dict[str, Any]:
    """Whether the values and names of the genes are such that the cells can be embedded."""
    from ..config import CellPatchConfig
    from ..genes import GeneVocabulary
    from ..loading.inputs import detect_in, sample_of, warn_if_selected

    facts: dict[str, Any] = {}
    vocabulary, match = GeneVocabulary.human(), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            match = vocabulary.match_var(source.var, None, source.name)
            names = str(match)
        except InputError as error:
            names = str(error)
        try:
            sample = sample_of(source)
            detected = detect_in(source, sample, "auto", CellPatchConfig().target_sum)
            facts["values"] = detected.reason
            if match is not None:
                warn_if_selected(source, sample, detected, match, vocabulary)
        except InputError as error:
            facts["values"] = f"cannot be embedded: {error}"
    facts["human genes"] = names
    said = [str(one.message) for one in caught if issubclass(one.category, InputWarning)]
    return facts | ({"warnings": said} if said else {})
