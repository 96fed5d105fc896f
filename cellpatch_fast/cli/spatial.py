"""The commands of ``cellpatch`` for tissues: spatial, synthetic-tissue."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from ..config import Backend, Reading
from ..spatial.choices import GraphKind, Method, Preset
from .fields import add_fields, given_fields
from .options import MODEL_HELP, RESUMABLE, positive


def add_spatial(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find the domains of a tissue: embed every spot among its neighbours (STAGATE, with "
        "CellPatch's features if a model is named), cluster, and draw. The output is a folder "
        "with tables and figures. After an interruption the same command goes on."
    )
    parser.epilog = (
        "example: cellpatch spatial slice.h5ad --model my-model --domains 7 --output domains"
    )
    parser.add_argument(
        "data", type=Path, metavar="DATA",
        help=".h5ad or AnnData .zarr: raw counts, coordinates in obsm",
    )  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the results")
    parser.add_argument("--model", metavar="DIR", help=f"{MODEL_HELP} (default: STAGATE alone)")
    parser.add_argument(
        "--domains", type=positive, metavar="N",
        help="how many (default: the number at which random starts agree best)",
    )  # fmt: skip
    parser.add_argument(
        "--truth", metavar="COLUMN", help="column of obs with annotated layers, to compare with"
    )
    parser.add_argument(
        "--method", choices=get_args(Method), default="mixture",
        help="of clustering (default: mixture, the most likely of 20 Gaussian mixtures)",
    )  # fmt: skip
    parser.add_argument(
        "--refined", action="store_true",
        help="give each spot the domain that most of its 50 nearest spots have",
    )  # fmt: skip
    _add_graph(parser)
    _add_network(parser)
    parser.set_defaults(run=_spatial, after_interruption=RESUMABLE)


def _add_graph(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("neighbours")
    group.add_argument(
        "--graph", choices=get_args(GraphKind), default="radius",
        help="spots within a radius, the nearest, or those of Visium's grid (default: radius)",
    )  # fmt: skip
    group.add_argument(
        "--radius", type=float, metavar="R",
        help="in the unit of the coordinates (default: gives a spot about 6 neighbours)",
    )  # fmt: skip
    group.add_argument(
        "--batch-key", metavar="COLUMN", help="column of obs with the slice of each spot"
    )
    group.add_argument(
        "--basis", default="spatial", metavar="NAME", help="of coordinates in obsm (spatial)"
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the network")
    group.add_argument(
        "--preset", choices=get_args(Preset), default="default",
        help="settings: what did best here, what the paper says, or what its code does",
    )  # fmt: skip
    group.add_argument("--epochs", type=positive, metavar="N", help="(default: the preset's)")
    group.add_argument(
        "--variable-genes", type=positive, metavar="N", help="most genes used (default: 3000)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of weights and starts (default: 0)")
    group.add_argument(
        "--tile-spots", type=positive, metavar="N",
        help="spots computed together at most: changes memory, the result by rounding only",
    )  # fmt: skip
    add_fields(parser, Reading)
    group.add_argument("--backend", choices=get_args(Backend), help="default: the fastest")
    group.add_argument("--device", metavar="D", help="cpu, cuda … (default: a GPU if there is one)")
    group.add_argument(
        "--overwrite", action="store_true", help="begin anew where there is a run already"
    )


def _spatial(parsed: argparse.Namespace) -> None:
    from ..spatial.run import spatial_run

    named = {name: getattr(parsed, name) for name in ("epochs", "variable_genes", "seed")}
    run = spatial_run(
        parsed.data, parsed.output, parsed.model,
        domains=parsed.domains, method=parsed.method, refined=parsed.refined, truth=parsed.truth,
        preset=parsed.preset, kind=parsed.graph, radius=parsed.radius, batch_key=parsed.batch_key,
        basis=parsed.basis, reading=Reading(**given_fields(parsed, Reading)),
        tile_spots=parsed.tile_spots, overwrite=parsed.overwrite, backend=parsed.backend,
        device=parsed.device,
        **{name: value for name, value in named.items() if value is not None},
    )  # fmt: skip
    print(f"{parsed.output}: {run}")


def add_synthetic_tissue(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a generated slice of tissue with known layers (obs['layer'])."
    parser.epilog = "example: cellpatch synthetic-tissue tissue.h5ad --spots 2000"
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the .h5ad file to make")
    for name, default, text in (
        ("spots", 2_000, "how many, about"),
        ("layers", 6, "bands of the tissue"),
        ("genes", 2_000, "the most common ones"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N",
            help=f"{text} (default: {default})",
        )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.set_defaults(run=_synthetic_tissue)


def _synthetic_tissue(parsed: argparse.Namespace) -> None:
    from ..errors import InputError
    from ..files import made_whole
    from ..synthetic.tissue import synthetic_tissue

    if parsed.output.exists() or parsed.output.suffix != ".h5ad":
        raise InputError(f"{parsed.output}: choose the name of a new .h5ad file")
    tissue = synthetic_tissue(
        parsed.spots, layers=parsed.layers, genes=parsed.genes, seed=parsed.seed
    )
    with made_whole(parsed.output) as unfinished:
        tissue.write_h5ad(unfinished)
    print(f"{parsed.output}: {tissue.n_obs:,} spots x {tissue.n_vars:,} genes")
