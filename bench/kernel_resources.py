"""What the compiler makes of the GPU kernels: ``python bench/kernel_resources.py [--output DIR]``.

Needs no GPU. Compiles the kernels of kernels/gpu/cells.py as they are launched, at the paper's
sizes, and those of ragged attention (`ragged_resources.py`), for every architecture that
configurations are shipped for, and reads registers, spills, memory and instructions from the
machine code with the tools of Triton's own wheel.

A full product of variants would be some hundred kernels per architecture and type, most of them
alike. `variants` compiles every choice of each parameter with every kernel, and those pairs that
change the machine code much: the whole encoder (DEPTH 3) and the attention alone (DEPTH 0), cells
whole and split, affine and binned values; and the encoder with every shipped number of stages.

What a row says of the main loop, that over a cell's entries, is a bound on speed, not a time:

- issue: clocks per entry and multiprocessor to issue all instructions of the loop, one per clock
  in each of the 4 schedulers;
- exp: clocks per entry of the unit that computes exponentials, 8 per instruction of a warp.

The larger one bounds the loop. Programs per multiprocessor is what registers, shared memory, tensor
memory and warps leave room for.

Prints Markdown; with ``--output`` writes it to kernel-resources.md, with kernel-resources.json.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.ragged_resources import RaggedVariant, ragged_variants  # noqa: E402

CONFIGURATIONS = ROOT / "kernels/gpu/configurations"
ARCHITECTURES = (80, 90, 100)  # compute capabilities
TYPES = {"float32": "fp16", "bfloat16": "bf16", "float16": "fp16"}  # of tables: of their terms
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

# Of a multiprocessor. A program may have 255 registers per thread and takes them by 8; the driver
# keeps 1 KB of shared memory per program. Architecture 100 has tensor memory, in columns.
REGISTERS, WARPS, PROGRAMS, TENSOR_COLUMNS = 65_536, 64, 32, 512
SHARED_KB = {80: 164, 90: 228, 100: 228}
RESERVED_KB = 1
SCHEDULERS, CLOCKS_PER_EXPONENTIAL = 4, 8


@dataclass(frozen=True)
class Variant:
    """One kernel, one launch configuration, one choice of everything fixed at compile time."""

    architecture: int
    type: str  # of the tables
    kernel: str
    tile: int
    warps: int
    stages: int
    programs: int  # per multiprocessor, intended
    genes: str = "u16"
    values: str = "u8"
    depth: int = 3
    split: bool = False
    binned: bool = False
    padded: bool = False
    mean: bool = False

    @property
    def exponentials(self) -> int:
        """Per entry, of the main loop; 0 if it has none."""
        from cellpatch_fast import CellPatchConfig

        config = CellPatchConfig()
        return 0 if self.split else config.patches * config.heads

    @property
    def choices(self) -> str:
        words = [f"{self.genes}/{self.values}", "binned" if self.binned else "affine"]
        if self.kernel == "encode_cells":
            words.append("encoder" if self.depth else "attention")
            chosen = {"split": self.split, "pads": self.padded, "mean": self.mean}
            words += [word for word, there in chosen.items() if there]
        return " ".join(words)

    def source(self) -> Any:
        """The kernel with its arguments as `encoder.py` launches it: an `ASTSource`."""
        from cellpatch_fast.kernels.gpu import cells
        from cellpatch_fast.kernels.gpu.tables import Tables
        from triton.compiler import ASTSource

        from cellpatch_fast import CellPatchConfig

        config = CellPatchConfig(value_embedding="binned" if self.binned else "affine")
        terms = f"*{TYPES[self.type]}"
        in_terms = ("rows", "query", "bin_rows", "matrices")
        kinds: Any = {name: terms if name in in_terms else "*fp32" for name in Tables._fields}
        tables = Tables(**kinds)
        pointers = {
            "offsets": "*i64", "genes": f"*{self.genes}", "values": f"*{self.values}",
            "pads": "*i64", "faults": "*i32",
        } | dict.fromkeys(("partials", "features", "normalizers", "weights"), "*fp32")  # fmt: skip
        integers = {
            "cells": 1009,  # as any number of cells and entries
            "entries": 1_000_003,
            "gene_rows": config.max_genes,
            "bins": config.value_bins if self.binned else 0,
            "patches": config.patches,
            "dim": config.dim if self.depth else config.head_dim,
            "output_dim": config.output_dim,
        }
        constants = {
            "PATCHES": config.patches,
            "HEADS": config.heads,
            "HEAD_DIM": config.head_dim,
            "DIM": config.dim,
            "MLP": config.mlp_dim,
            "OUTPUT": 16,  # the projection's 10, padded
            "DEPTH": self.depth,
            "BINNED": self.binned,
            "TERMS": 2 if self.type == "float32" else 1,
            "PADDED": self.padded,
            "PROJECTED": True,
            "MEAN": self.mean,
            "SPLIT": self.split,
            "TILE": self.tile,
            "STAGES": self.stages,
        }
        kernel = getattr(cells, self.kernel)
        signature: dict[str, Any] = {}
        divisible: list[tuple[int, ...]] = []  # places of arguments: by 16, as Triton specialises
        for place, parameter in enumerate(kernel.params):
            name = parameter.name
            if name == "tables":
                signature[name] = tables
                divisible += [(place, field) for field in range(len(tables))]
            elif name in constants:
                signature[name] = "constexpr"
            else:
                signature[name] = pointers.get(name, "i32")
                aligned = name in pointers or integers[name] % 16 == 0
                as_any = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
                if aligned and not as_any:
                    divisible.append((place,))
        return ASTSource(
            kernel,
            signature,
            {name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
            {place: [["tt.divisibility", 16]] for place in divisible},
        )


AnyVariant = Variant | RaggedVariant


def shipped(architecture: int) -> Iterator[Variant]:
    """One variant per type and number of stages in an architecture's file, most stages first."""
    settings = json.loads((CONFIGURATIONS / f"sm{architecture}.json").read_text())["types"]
    for name, of_type in settings.items():
        for number in sorted({bucket["stages"] for bucket in of_type["buckets"]}, reverse=True):
            yield Variant(
                architecture, name, "encode_cells", of_type["tile"], of_type["warps"], number,
                of_type["programs_per_multiprocessor"],
            )  # fmt: skip


def variants(architectures: Iterable[int], once: bool = False) -> list[Variant]:
    """What is compiled; ``once``: each kernel for each architecture in float32 and bfloat16 only.

    What float16 is compiled to is bfloat16's code but for the format.
    """
    variants: list[Variant] = []
    met: set[tuple[int, str]] = set()
    for encode in itertools.chain.from_iterable(map(shipped, architectures)):
        if once and encode.type == "float16":
            continue
        if (encode.architecture, encode.type) in met:  # with fewer stages: the encoder alone
            variants += [] if once else [encode]
            continue
        met.add((encode.architecture, encode.type))
        chunks = replace(encode, kernel="attend_chunks")
        weigh = replace(encode, kernel="weigh_entries", genes="i32", values="fp32")
        variants += [encode, replace(chunks, binned=True, stages=1), weigh]
        if not once and encode.type != "float16":
            attention = replace(encode, depth=0)
            variants += [
                replace(encode, binned=True, stages=1, padded=True, mean=True),
                replace(encode, split=True, padded=True, mean=True),
                replace(attention, padded=True, genes="i32", values="fp32"),
                replace(attention, binned=True, stages=1, genes="i32"),
                replace(attention, split=True, binned=True, stages=1),
                replace(chunks, values="fp16"),
                replace(weigh, binned=True, stages=1, values="u8"),
            ]
    return variants


def measure(variant: AnyVariant) -> dict[str, Any]:
    """Compile one variant; what its machine code needs and does."""
    import triton
    from cellpatch_fast.kernels.gpu.configuration import Configuration, compiler_options
    from triton.backends.compiler import GPUTarget

    started = processor_seconds()
    configuration = Configuration(variant.tile, variant.warps, variant.stages)
    options = compiler_options(variant.architecture, configuration)
    target = GPUTarget("cuda", variant.architecture, 32)
    try:
        kernel = triton.compile(variant.source(), target=target, options=options)
    except Exception as error:
        raise RuntimeError(f"does not compile: {variant}") from error
    seconds = processor_seconds() - started
    usage, instructions, loops = read_machine_code(kernel.asm["cubin"])
    counts = collections.Counter(
        instruction.split()[0].split(".")[0] for instruction in instructions
    )
    tensor_columns = getattr(kernel.metadata, "tmem_size", 0) or 0
    shared = kernel.metadata.shared
    return {
        **asdict(variant),
        "choices": variant.choices,
        "tile": variant.tile,
        "warps": variant.warps,
        "stages": variant.stages,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "spill instructions": counts["LDL"] + counts["STL"],
        "shared": shared,
        "tensor columns": tensor_columns,
        "programs that fit": programs(variant, usage["REG"], shared, tensor_columns),
        "instructions": len(instructions),
        "matrix instructions": counts[MATRIX_INSTRUCTION[variant.architecture]],
        "older matrix instructions": counts[MATRIX_INSTRUCTION[80]],
        **main_loop(variant, instructions, loops),
        "compile seconds": seconds,
    }


def programs(variant: AnyVariant, registers: int, shared: int, tensor_columns: int) -> int:
    """Programs that a multiprocessor has room for."""
    return min(
        REGISTERS // (variant.warps * 32 * -(-registers // 8) * 8),
        SHARED_KB[variant.architecture] * 1024 // (shared + RESERVED_KB * 1024),
        TENSOR_COLUMNS // max(tensor_columns, 1),
        WARPS // variant.warps,
        PROGRAMS,
    )


def main_loop(
    variant: AnyVariant, instructions: list[str], loops: list[tuple[int, int]]
) -> dict[str, float]:
    """Clocks per entry of the smallest loop with all exponentials of a tile of entries."""
    expected = variant.exponentials * variant.tile // (32 * variant.warps)
    whole = []
    for first, last in loops if expected else []:
        exponentials = sum("MUFU.EX2" in text for text in instructions[first:last])
        if exponentials >= expected:
            whole.append((last - first, first, last))
    if not whole:
        return {}
    length, first, last = min(whole)
    special = sum(text.startswith("MUFU") for text in instructions[first:last])
    per_entry = variant.warps / variant.tile / SCHEDULERS
    return {
        "loop instructions": length,
        "issue clocks per entry": length * per_entry,
        "exp clocks per entry": special * CLOCKS_PER_EXPONENTIAL * per_entry,
    }


def read_machine_code(cubin: bytes) -> tuple[dict[str, int], list[str], list[tuple[int, int]]]:
    """Resources by cuobjdump's names; instructions; loops as ranges of them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        listing = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    usage = {
        name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)
    }
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?(.*?);", line):
            instructions.append(instruction[1].strip())
    loops = []
    for place, text in enumerate(instructions):
        branch = re.match(r"BRA.*`\((\.L_x_\d+)\)", text)
        if branch and labels[branch[1]] <= place:
            loops.append((labels[branch[1]], place + 1))
    return usage, instructions, loops


def processor_seconds() -> float:
    """Of this process and those it waited for, as ptxas: other work on the machine adds nothing."""
    return sum(os.times()[:4])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure_all(chosen: list[AnyVariant], *, compiled_anew: bool) -> Iterator[dict[str, Any]]:
    """`measure` of each, in as many processes as there are processors.

    Kernels are taken from Triton's own cache, but for those ``compiled_anew``, whose cache is
    empty: their seconds are those of compiling.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled
    for variant in chosen:
        variant.source().hash()  # what Triton keeps by it depends on what was asked for before
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as empty:
        if compiled_anew:
            os.environ["TRITON_CACHE_DIR"] = empty
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            yield from pool.map(measure, chosen)


COLUMNS = {
    "GPU": "sm{architecture}",
    "type": "{type}",
    "kernel": "{kernel}",
    "variant": "{choices}",
    "tile, warps, stages": "{tile}, {warps}, {stages}",
    "registers": "{registers}",
    "stack + local, B": "{memory}",
    "shared, KB": "{shared_kb:.1f}",
    "programs": "{fit}",
    "matrix instructions": "{matrix}",
    "issue": "{issue}",
    "exp": "{exp}",
    "code, KB": "{code:.0f}",
    "compiled in, processor s": "{seconds:.1f}",
}


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown of all rows."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * 5}{' ---: |' * (len(COLUMNS) - 5)}"]
    for row in rows:
        clocks = (row.get(f"{kind} clocks per entry") for kind in ("issue", "exp"))
        issue, exp = ("" if number is None else f"{number:.1f}" for number in clocks)
        cells = " | ".join(COLUMNS.values()).format(
            **row, memory=row["stack"] + row["local"], shared_kb=row["shared"] / 1024,
            fit=row["programs that fit"], matrix=row["matrix instructions"], issue=issue, exp=exp,
            code=row["instructions"] * 16 / 1024, seconds=row["compile seconds"],
        )  # fmt: skip
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", type=int, nargs="+", choices=ARCHITECTURES,
                        default=ARCHITECTURES, help="compute capability times 10")  # fmt: skip
    parser.add_argument("--once", action="store_true",
                        help="each kernel once, out of the cache if it is there")  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder for kernel-resources.md and .json")
    options = parser.parse_args()
    chosen: list[AnyVariant] = [
        *variants(options.architecture, options.once),
        *ragged_variants(options.architecture, options.once),
    ]
    rows = []
    for row in measure_all(chosen, compiled_anew=not options.once):
        rows.append(row)
        print(f"{len(rows)} of {len(chosen)} kernels compiled", file=sys.stderr, end="\r")
    import triton

    heading = f"Kernels as Triton {triton.__version__} compiles them (`bench/kernel_resources.py`)"
    text = f"{heading}\n\n{report(rows)}\n"
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "kernel-resources.md").write_text(text)
        results = {"triton": triton.__version__, "kernels": rows}
        (options.output / "kernel-resources.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
