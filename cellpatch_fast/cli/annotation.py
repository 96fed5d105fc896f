"""The command ``cellpatch annotate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from .options import MODEL_HELP, RESUMABLE, Commands, add_inputs, add_reading, positive


def add_annotate(commands: Commands) -> None:
    parser = commands.add_parser(
        "annotate",
        help="tell the types of cells",
        description="Annotate every cell of the inputs, in file order and bounded memory. The "
        "result is an AnnData Zarr store with obs['cellpatch_label'], "
        "obs['cellpatch_probability'], obsm['cellpatch_probabilities'] and obsm['X_cellpatch']. "
        "Until it is complete it is called OUT.zarr.partial; the same command finishes it.",
        epilog="example: cellpatch annotate new.h5ad --model annotator --output annotated.zarr",
    )
    add_inputs(parser, " or token stores")
    parser.add_argument("--model", required=True, metavar="DIR", help=f"annotator: {MODEL_HELP}")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="OUT.zarr", help="the store to make"
    )
    add_reading(parser)
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
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of what is stored in obsm (default: float32)",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="cells per batch at most")
    parser.add_argument("--backend", choices=("reference", "numba", "triton"))
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing store, once the new one is complete",
    )
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
        layer=parsed.layer,
        use_raw=parsed.use_raw,
        gene_column=parsed.gene_column,
        input=parsed.values,
        dtype=parsed.dtype,
        batch_size=parsed.batch_size,
        backend=parsed.backend,
        device=parsed.device,
        overwrite=parsed.overwrite,
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
