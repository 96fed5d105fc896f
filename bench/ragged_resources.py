"""Which variants of ragged attention's kernels ``kernel_resources.py`` compiles.

At CellPatch's size (64 queries, 2 heads of 16, tables and amounts) and, as other code calls them,
for 256 queries of heads of 64 and 128 over keys of their own; besides, once for each architecture,
everything that is optional at once. Numbers per entry are for one head and one block of queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ATTEND, DIFFERENTIATE = "attend_slots", "differentiate_slots"
SMALL = ("merge_slots", "sum_pieces", "sum_slots")  # without products


@dataclass(frozen=True)
class RaggedVariant:
    """One kernel, one choice of everything fixed at compile time."""

    architecture: int
    type: str  # of keys
    kernel: str
    head_dim: int = 16
    queries: int = 64
    gathered: bool = True  # from tables, by atomics backward; with amounts
    binned: bool = False
    biased: bool = False  # and weights are dropped
    sorted: bool = False  # a row of gradients per entry, whether gathered or not
    programs: int = 1  # per multiprocessor, intended

    @property
    def block(self) -> int:
        return min(self.queries, self.shape[0])

    @property
    def shape(self) -> Any:
        import torch
        from cellpatch_fast.kernels.gpu.ragged_shapes import backward_shape, forward_shape

        dtype = getattr(torch, self.type)
        if self.kernel == DIFFERENTIATE:
            return backward_shape(dtype, self.head_dim, self.gathered, self.biased)
        return forward_shape(dtype, self.head_dim)

    @property
    def tile(self) -> int:
        return 32 if self.kernel in SMALL else int(self.shape.configuration.tile)

    @property
    def warps(self) -> int:
        return 4 if self.kernel in SMALL else int(self.shape.configuration.warps)

    @property
    def stages(self) -> int:
        return 1 if self.kernel in SMALL else int(self.shape.configuration.stages)

    @property
    def exponentials(self) -> int:
        """Per entry, of the main loop."""
        return 0 if self.kernel in SMALL else self.block

    @property
    def choices(self) -> str:
        chosen = {"table": self.gathered, "binned": self.binned, "sorted": self.sorted,
                  "bias, dropout": self.biased}  # fmt: skip
        words = [f"{self.queries} queries of {self.head_dim}"]
        return " ".join([*words, *(word for word, there in chosen.items() if there)])

    def source(self) -> Any:
        """The kernel with its arguments as `ragged_launch.py` launches it."""
        from cellpatch_fast.kernels.gpu import ragged, ragged_backward, segments
        from triton.compiler import ASTSource

        modules = {ATTEND: ragged, "merge_slots": ragged, DIFFERENTIATE: ragged_backward}
        kernel = getattr(modules.get(self.kernel, segments), self.kernel)
        kind = f"*{TYPES[self.type]}"
        pointers = dict.fromkeys(("query", "key", "value", "gradient", "output"), kind)
        pointers |= {"offsets": "*i64", "faults": "*i32", "order": "*i64"}
        pointers |= dict.fromkeys(
            ("delta", "log_sum_exp", "normalizers", "partials", "of_query", "rows", "sums"), "*fp32"
        )
        stored = "*fp32" if self.gathered or self.sorted else kind
        pointers |= dict.fromkeys(("of_key", "of_value"), stored)
        if self.gathered:
            pointers |= {"ids": "*u16", "amounts": "*u8", "key_part": kind, "value_part": kind}
            pointers |= {"of_parts": "*fp32"}
        if self.biased:
            pointers |= {"bias": "*fp32", "of_bias": "*fp32", "seed": "*i64"}
        if self.kernel in (ATTEND, DIFFERENTIATE):
            del pointers["rows"]  # there, a number
        absent = ("ids", "amounts", "key_part", "value_part", "of_parts", "bias", "of_bias", "seed")
        constants: dict[str, int | None] = {
            "HEAD_DIM": self.head_dim, "DIM": self.head_dim, "BINNED": self.binned, "WIDE": False,
            "QUERIES": self.block, "TILE": self.tile, "STAGES": self.stages, "PARTS": 16,
            "ONE_BLOCK": self.queries <= self.block, "ATOMIC": self.gathered and not self.sorted,
            "EXACT": self.type == "float32", "WIDTH": 64,
        }  # fmt: skip
        constants |= {name: None for name in absent if name not in pointers}
        signature: dict[str, str] = {}
        divisible: list[tuple[int]] = []  # places of arguments: by 16, as Triton specialises
        for place, parameter in enumerate(kernel.params):
            name = parameter.name
            other = "fp32" if name in ("scale", "keep_scale") else "i32"
            signature[name] = "constexpr" if name in constants else pointers.get(name, other)
            if signature[name][0] == "*" and not parameter.do_not_specialize_on_alignment:
                divisible.append((place,))
        return ASTSource(
            kernel,
            signature,
            {name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
            {place: [["tt.divisibility", 16]] for place in divisible},
        )


def ragged_variants(architectures: Iterable[int], once: bool = False) -> list[RaggedVariant]:
    """What is compiled; ``once``: one half type, which the other repeats, and the widest heads."""
    variants = []
    for architecture in architectures:
        for name in ("float32", "bfloat16") if once else TYPES:
            for kernel in (ATTEND, DIFFERENTIATE):
                narrow = RaggedVariant(architecture, name, kernel)
                wide = replace(narrow, head_dim=64, queries=256, gathered=False)
                variants += [narrow, replace(wide, head_dim=128)]
                if not once:
                    variants += [wide, replace(narrow, binned=True), replace(wide, sorted=True)]
                if name == "bfloat16":
                    variants.append(replace(narrow, binned=True, biased=True, sorted=True))
        variants += [RaggedVariant(architecture, "bfloat16", kernel) for kernel in SMALL]
    return variants
