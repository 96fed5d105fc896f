"""The commands of ``cellpatch`` that make data: synthetic-atlas."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import natural, positive

SIZES = {  # name of the option, and what it says; defaults are those of the function
    "genes": "median number of genes per cell (default: 820)",
    "cell_types": "number of cell types (default: 10)",
    "markers": "marker genes of each type (default: 40)",
    "batches": "number of batches (default: 4)",
    "donors": "number of donors (default: two for each batch)",
    "seed": "of the cells (default: 0)",
}


def add_synthetic_atlas(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write an AnnData file of generated cells: raw counts of human genes with "
        "realistic frequencies, cell types with marker genes, batches and donors. Takes bounded "
        "memory, whatever the number of cells."
    )
    parser.epilog = "example: cellpatch synthetic-atlas atlas.h5ad --cells 1000000"
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="the file to make: .h5ad or .zarr"
    )
    parser.add_argument("--cells", type=positive, required=True, metavar="N", help="how many")
    for name, text in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=natural, metavar="N", help=text)
    parser.add_argument(
        "--spread",
        type=float,
        metavar="X",
        help="standard deviation of the logarithm of genes per cell (default: 0.31)",
    )
    parser.add_argument(
        "--marker-fold",
        type=float,
        metavar="X",
        help="how much more common a marker is in its type (default: 8)",
    )
    parser.add_argument(
        "--compression",
        metavar="C",
        help="gzip or lzf for .h5ad, lz4 or zstd for .zarr (default: none)",
    )
    parser.set_defaults(run=_synthetic_atlas)


def _synthetic_atlas(parsed: argparse.Namespace) -> None:
    from ..synthetic.generate import synthetic_atlas

    names = (*SIZES, "spread", "marker_fold")
    given = {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}
    print(synthetic_atlas(parsed.output, parsed.cells, compression=parsed.compression, **given))
