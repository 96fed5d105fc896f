"""What a path holds, for ``cellpatch inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError
from .io.embeddings import JOURNAL, finished_settings


def describe(path: Path) -> dict[str, Any]:
    """Facts about a model directory, an AnnData file or an embedding store, in reading order.

    Raises
    ------
    InputError
        If there is nothing at ``path``, or nothing that we know.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if (path / JOURNAL).is_file():
        return _unfinished(path)
    if (path / "config.json").is_file():
        return _model(path)
    if path.is_dir() and (settings := finished_settings(path)) is not None:
        return {"kind": "embedding store"} | _matrix_of_store(path) | settings
    from .io.sources import open_source

    with open_source(path) as source:
        return {"kind": "cells"} | source.describe()


def _model(path: Path) -> dict[str, Any]:
    from .model import CellPatch, fingerprint

    model = CellPatch.from_pretrained(path)
    return {
        "kind": "CellPatch model",
        "genes": len(model.vocabulary),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": fingerprint(model),
        **model.config.to_dict(),
    }


def _matrix_of_store(path: Path) -> dict[str, Any]:
    import zarr

    facts: dict[str, Any] = {}
    for key, array in zarr.open_group(path, mode="r")["obsm"].arrays():  # type: ignore[union-attr]
        facts["cells"] = array.shape[0]
        facts[f"obsm/{key}"] = f"{array.shape[0]} x {array.shape[1]} {array.dtype}"
    return facts


def _unfinished(path: Path) -> dict[str, Any]:
    import json

    journal = json.loads((path / JOURNAL).read_text())
    return {
        "kind": "unfinished embedding store (the same command finishes it)",
        "shards done": len(journal["done"]),
        **journal["settings"],
    }
