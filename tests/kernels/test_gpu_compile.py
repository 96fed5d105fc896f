"""What the compiler makes of the GPU kernels, on any Linux machine: no GPU is needed.

Each kernel is compiled once for each architecture and type of tables, and then kept in Triton's
cache until its source or the compiler changes, as it is for those who use it; the whole table, with
every variant, is what ``bench/kernel_resources.py`` prints.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

SCRIPT = Path(__file__).parents[2] / "bench/kernel_resources.py"
ARCHITECTURES = (80, 90, 100)
TYPES = ("float32", "bfloat16")  # what float16 is compiled to is bfloat16's code but for the format
KERNELS = ("encode_cells", "attend_chunks", "weigh_entries")
RAGGED = ("attend_slots", "differentiate_slots")  # of any attention, forward and backward
SUMS = ("merge_slots", "sum_pieces", "sum_slots")  # without products, alike for all types

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is made for Linux only"
)

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """One row per kernel, see ``bench/kernel_resources.py``; compiled by one worker for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernel-resources"
    with FileLock(f"{folder}.lock"):
        if not (folder / "kernel-resources.json").exists():
            compile_all(folder)
    kernels: Rows = json.loads((folder / "kernel-resources.json").read_text())["kernels"]
    return kernels


def compile_all(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder.mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--once", "--output", str(folder)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def names(rows: Rows) -> list[str]:
    return [f"sm{r['architecture']} {r['type']} {r['kernel']} {r['choices']}" for r in rows]


def test_every_kernel_compiles_for_every_architecture_and_type(compiled: Rows) -> None:
    found = {(row["architecture"], row["type"], row["kernel"]) for row in compiled}
    expected = set(itertools.product(ARCHITECTURES, TYPES, KERNELS + RAGGED))
    assert found == expected | set(itertools.product(ARCHITECTURES, ["bfloat16"], SUMS))
    for name, kernel in itertools.product(TYPES, RAGGED):
        of_kernel = [r for r in compiled if (r["type"], r["kernel"]) == (name, kernel)]
        widths = {(row["architecture"], row["head_dim"]) for row in of_kernel}
        assert widths == set(itertools.product(ARCHITECTURES, (16, 128)))


def test_nothing_spills_to_local_memory(compiled: Rows) -> None:
    """But the backward in float32 with the widest heads, whatever its tiles."""
    kinds = ("stack", "local", "spill instructions")
    spilled = [row for row in compiled if any(row[kind] for kind in kinds)]
    known = ("float32", "differentiate_slots", 128)
    found = {(row["type"], row["kernel"], row.get("head_dim")) for row in spilled}
    assert found <= {known}, names(spilled)


def test_products_run_on_the_matrix_units(compiled: Rows) -> None:
    """Narrow tiles on those of sm80, which newer architectures have too."""
    products = [row for row in compiled if row["kernel"] not in SUMS]
    none = [row for row in products if row["matrix instructions"] == 0]
    newest = [
        row
        for row in none
        if row["kernel"] in KERNELS or (row["head_dim"] == 16 and row["type"] != "float32")
    ]
    assert names(newest) == []
    assert names([row for row in none if row["older matrix instructions"] == 0]) == []


def test_a_multiprocessor_has_room_for_the_intended_programs(compiled: Rows) -> None:
    assert names([row for row in compiled if row["registers"] > 255]) == []
    assert names([row for row in compiled if row["programs that fit"] < row["programs"]]) == []


def test_exponentials_bound_the_loop_over_entries_in_16_bit_types(compiled: Rows) -> None:
    """Nothing else takes as long; and no exponential is computed twice.

    Architecture 100 moves operands through tensor memory, whose instructions take about as long.
    """
    kernels = ("encode_cells", "attend_chunks")
    loops = [row for row in compiled if row["type"] != "float32" and row["kernel"] in kernels]
    assert len(loops) == 6
    assert all(row["issue clocks per entry"] < 10.5 for row in loops)
    loops = [row for row in loops if row["architecture"] < 100]
    slow = [r for r in loops if r["issue clocks per entry"] >= r["exp clocks per entry"]]
    assert names(slow) == []
    assert all(8 <= row["exp clocks per entry"] < 8.5 for row in loops)


@pytest.mark.parametrize(("kernel", "most"), [("attend_slots", 9.5), ("differentiate_slots", 13.0)])
def test_ragged_attention_of_cellpatch_s_size_issues_few_instructions(
    compiled: Rows, kernel: str, most: float
) -> None:
    """Clocks per entry and head; none of the exponentials is computed twice, which takes 4."""
    rows = [
        row
        for row in compiled
        if row["kernel"] == kernel and row["head_dim"] == 16 and row["type"] != "float32"
    ]
    rows = [row for row in rows if not row["biased"]]
    assert len(rows) == 3
    assert all(row["issue clocks per entry"] < most for row in rows)
    assert all(4 <= row["exp clocks per entry"] < 4.5 for row in rows)
