"""The Triton kernels' speed: ``python bench/kernels.py [--output FILE.json]``, under 8 minutes.

Measures on one GPU, for cells of constant and mixed lengths in batches that fill it:

- ceilings (`bench.ceilings`), and the share of the roofline that the kernels reach;
- cross-attention alone against what others have built (`bench.peers.attention`), each plain
  and with projected tables;
- the whole encoder against the padded computation of the original (`bench.peers.original`);
- one long cell and very many short ones, also replayed from a CUDA graph;
- the memory that a call takes.

Every method is first compared with the float64 reference on a small batch. One that is wrong, fails
or cannot be imported keeps its place in the results, with the reason instead of a speed.

``--toy`` takes tiny sizes; with ``--device cpu`` the kernels then run in Triton's interpreter. That
shows that all of this works and says nothing about speed.

Prints Markdown and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cellpatch_fast.kernels import EncoderWeights, reference

from bench.batches import Drawing, chosen_cases
from bench.ceilings import Work, measure_ceilings, roofline
from bench.command import TYPES, describe, parse
from bench.measure import Call, Computes, Effort, Method, Reference, Row, Suite, measure_cases
from bench.peers import attention
from bench.peers.original import PaddedPathFormer
from bench.report import report, targets
from cellpatch_fast import RaggedCells

GENES, TOY_GENES = 60_664, 997
ENTRIES = 20_000_000  # of a batch
CHECKED_LENGTHS, TOY_CHECKED_LENGTHS = (1, 17, 500, 1000, 4000, 20_000), (1, 70)
ORIGINAL_TOKENS = 1 << 22  # that the original takes at once
WIDE_SCORE = 100.0


def convert(weights: EncoderWeights, dtype: torch.dtype) -> EncoderWeights:
    tensors, structure = weights.flatten()
    return EncoderWeights.unflatten([tensor.detach().to(dtype) for tensor in tensors], structure)


def widened(weights: EncoderWeights) -> EncoderWeights:
    """The weights with queries scaled so that the largest gene's score is `WIDE_SCORE`."""
    queries, keys, _ = reference.project_tables(weights)
    largest = max(
        float(torch.einsum("phd,ghd->hpg", queries, part).abs().max()) for part in keys.split(4096)
    )
    matrix, bias = weights.cross.in_weight.clone(), weights.cross.in_bias.clone()
    dim = weights.patches.shape[1]
    matrix[:dim] *= WIDE_SCORE / largest
    bias[:dim] *= WIDE_SCORE / largest
    return weights._replace(cross=weights.cross._replace(in_weight=matrix, in_bias=bias))


def our_methods(weights: EncoderWeights, dtype: torch.dtype) -> Iterator[Method]:
    """The kernels as `kernels.encode` calls them, with chunks of cells split off or not."""
    from cellpatch_fast.kernels.gpu import encoder

    def attend(cells: RaggedCells, split: bool | None) -> Tensor:
        inputs = cells.offsets, cells.genes, cells.values
        return encoder.patch_attention(weights, *inputs, dtype=dtype, split=split)[0]

    def encode(cells: RaggedCells, split: bool | None) -> Tensor:
        inputs = cells.offsets, cells.genes, cells.values
        return encoder.encode(weights, *inputs, dtype=dtype, split=split).features

    def launch(cells: RaggedCells, computes: Computes) -> Call:
        # Encoding while a graph is captured also captures the making of the tables, because a
        # replay must see the weights of its own time. What is replayed here is the kernels alone.
        inputs = cells.offsets, cells.genes, cells.values
        ready = encoder._Launch(weights, *inputs, None, dtype, None)
        if computes == "encoder":
            return partial(ready.encode, False)
        return lambda: ready.attend()[0]

    def prepared(function: Any, split: bool | None, cells: RaggedCells) -> Call:
        return partial(function, cells, split)

    functions: dict[Computes, Any] = {"cross-attention": attend, "encoder": encode}
    for computes, function in functions.items():
        yield Method(computes, "ours", "", partial(prepared, function, None), ours=True)
        for name, split in (("ours, split", True), ("ours, not split", False)):
            if computes == "cross-attention":  # the rest of the encoder is the same
                yield Method(computes, name, "", partial(prepared, function, split), ours=True)
        replayed = partial(launch, computes=computes)
        yield Method(computes, "ours", "", replayed, ours=True, replayed=True)


def original_methods(model: PaddedPathFormer, dtype: torch.dtype) -> Iterator[Method]:
    """The padded original, as it is and in the favour of the type and PyTorch's fused attention."""

    def prepare(model: PaddedPathFormer, dtype: torch.dtype, cells: RaggedCells) -> Call:
        genes, values = cells.to_padded()
        return partial(model.get_mid_embeding, values.to(dtype), genes)

    fused = PaddedPathFormer(model.gene2vector.num_embeddings, fused=True).eval()
    fused.load_state_dict(model.state_dict())
    fused = fused.to(model.gene2vector.weight.device, dtype).requires_grad_(False)
    for form, module, of_type in (
        ("float32", model, torch.float32),
        (f"{str(dtype).removeprefix('torch.')}, fused attention", fused, dtype),
    ):
        yield Method(
            "encoder",
            "padded original",
            form,
            partial(prepare, module, of_type),
            padded_tokens=ORIGINAL_TOKENS,
            attends_to_padding=True,
        )


def expected(
    weights: EncoderWeights,
    cells: RaggedCells,
    dtype: torch.dtype,
    computes: Computes,
    pads: Tensor | None,
) -> Tensor:
    """The reference's result in ``dtype``."""
    inputs = cells.offsets, cells.genes, cells.values
    weights = convert(weights, dtype)
    if computes == "encoder":
        return reference.encode(weights, *inputs, pads=pads).features
    return reference.patch_cross_attention(weights, *inputs, pads=pads).attended


def measure_all(
    model: PaddedPathFormer,
    device: torch.device,
    dtype: torch.dtype,
    options: argparse.Namespace,
) -> Iterator[Row]:
    """A row for every method on every case."""
    from cellpatch_fast.model.live import _live_weights

    genes = model.gene2vector.num_embeddings - 1
    drawing = Drawing(device, ENTRIES, genes=genes, shorten=100 if options.toy else 1)
    effort = Effort(0.0, 1, 1) if options.toy else Effort()
    lengths = torch.tensor(TOY_CHECKED_LENGTHS if options.toy else CHECKED_LENGTHS).numpy()
    small = drawing.cells(lengths)
    weights = convert(_live_weights(model, project_out=True), torch.float32)
    suites = {}
    for wide, of_suite in {False: weights, True: widened(weights)}.items():
        methods = list(our_methods(of_suite, dtype))
        if not wide:
            methods += attention.methods(weights, dtype)
            methods += original_methods(model, dtype)
        right = Reference(partial(expected, of_suite, small), small)
        suites[wide] = Suite(methods, partial(right.check, dtype=dtype))
    cases = chosen_cases(options.only, options.toy)
    return measure_cases(cases, drawing, lambda case: suites[case.wide], effort, options.until)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements; written to ``options.output`` after every row."""
    device, dtype = torch.device(options.device), TYPES[options.dtype]
    torch.manual_seed(0)
    model = PaddedPathFormer((TOY_GENES if options.toy else GENES) + 1)
    model = model.eval().requires_grad_(False).to(device)
    heads = model.sizes[1]
    work = Work.of(model.pathway_token.shape[1], heads, model.sizes[0] // heads, dtype)
    ceilings = measure_ceilings(device, dtype, options.toy)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "toy": options.toy,
        "tables": options.dtype,
        "machine": describe(device),
        "ceilings": ceilings,
        "work per gene": work._asdict(),
        "roofline genes/s": roofline(ceilings, work) if device.type == "cuda" else None,
        "rows": [],
    }
    for row in measure_all(model, device, dtype, options):
        results["rows"].append(row.as_json())
        results["table bytes"] = table_bytes()
        results["targets"] = targets(results)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table_bytes() -> int | None:
    """Of the tables that the kernels keep, for one set of weights."""
    from cellpatch_fast.kernels.gpu import encoder

    kept = [tables for _, tables, _ in encoder.kept._kept.values()]
    return max((sum(tensor.nbytes for tensor in tables) for tables in kept), default=None)


def main() -> None:
    options = parse(__doc__, "kernels")
    with torch.no_grad():
        print(report(run(options)))


if __name__ == "__main__":
    main()
