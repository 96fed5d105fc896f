"""The command ``cellpatch annotate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import Reading
from ..errors import InputError
from .fields import add_fields, given_fields
from .options import (
    MODEL_HELP,
    RESUMABLE,
    add_computing,
    add_inputs,
    add_selection,
    given_computing,
    given_selection,
)


def add_annotate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Annotate every cell of the inputs, in file order and bounded memory. The "
        "result is an AnnData Zarr store with obs['cellpatch_label'], "
        "obs['cellpatch_probability'], obsm['cellpatch_probabilities'] and obsm['X_cellpatch']. "
        "Until it is complete it is called OUT.zarr.partial; the same command finishes it."
    )
    parser.epilog = "example: cellpatch annotate new.h5ad --model annotator --output annotated.zarr"
    add_inputs(parser, " or token stores")
    parser.add_argument("--model", required=True, metavar="DIR", help=f"annotator: {MODEL_HELP}")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="OUT.zarr", help="the store to make"
    )
    add_fields(parser, Reading)
    add_selection(parser)
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="P",
        help="cells whose type has a lower probability are 'unknown' (default: 0)",
    )
    parser.add_argument(
        "--label",
        metavar="COLUMN",
        help="column of obs with true types, to compare with; all of them are in the table of "
        "truth x prediction, also those that the model does not have",
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE",
        help="with --label: a csv file that says what types are called in the model, in lines of "
        "two names such as Monocytes,CD14+; several may be one type of the model, and what is "
        "not in the file keeps its name. A first line whose names occur neither in the data nor in "
        "the model is a header",
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="with --label: tables and figures of that"
    )
    parser.add_argument(
        "--no-embedding",
        dest="embedding",
        action="store_false",
        help="do not store the embedding, which takes 8 KB per cell",
    )
    add_computing(parser, "what is stored in obsm")
    parser.set_defaults(run=_annotate, after_interruption=RESUMABLE)


def _annotate(parsed: argparse.Namespace) -> None:
    from .. import atlas
    from ..inference.labels import read_label_map
    from ..plots.confusion import save_confusion

    if parsed.report is not None and parsed.label is None:
        raise InputError("--report compares with true types: name their column with --label")
    done = atlas.annotate(
        parsed.inputs,
        parsed.model,
        parsed.output,
        threshold=parsed.threshold,
        embedding=parsed.embedding,
        label=parsed.label,
        label_map=None if parsed.label_map is None else read_label_map(parsed.label_map),
        **given_fields(parsed, Reading),
        **given_selection(parsed),
        **given_computing(parsed),
    )
    print(done)
    if parsed.report is not None and done.evaluation is not None:
        done.evaluation.save(parsed.report)
        save_confusion(
            done.evaluation.confusion,
            parsed.report / "confusion",
            others=len(done.evaluation.other_labels),
            title=done.evaluation.headline,
        )
