"""The commands of ``cellpatch`` that make data: synthetic-atlas."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..synthetic.settings import AtlasSettings
from .fields import add_fields, given_fields
from .options import positive


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
    add_fields(parser, AtlasSettings)
    parser.add_argument(
        "--compression",
        metavar="C",
        help="gzip or lzf for .h5ad, lz4 or zstd for .zarr (default: none)",
    )
    parser.set_defaults(run=_synthetic_atlas)


def _synthetic_atlas(parsed: argparse.Namespace) -> None:
    from ..synthetic.generate import synthetic_atlas

    settings = given_fields(parsed, AtlasSettings)
    print(synthetic_atlas(parsed.output, parsed.cells, compression=parsed.compression, **settings))
