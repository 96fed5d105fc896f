"""Small runs, made up: no number in them was measured."""

from __future__ import annotations

from typing import Any

from bench.reporting.results import Record, Run, Timing

OURS, CAPPED, WHOLE = "CellPatch (ours)", "scGPT", "Geneformer V1"
CAP = 1_009
GENES = (503, 1_009, 2_000)
LOST = "out of memory"


def timing(seconds: float) -> Timing:
    return Timing(0.9 * seconds, seconds, 1.1 * seconds, 7)


def point(model: str, genes: int, seconds: float | None, **details: Any) -> Record:
    """A runtime record, without a time where there are no seconds."""
    details = {"model": model, "genes": genes, **details}
    name = f"runtime/{model}/{genes}"
    if seconds is None:
        return Record("runtime", name, LOST, "3 GB asked for", details=details)
    return Record("runtime", name, "measured", "", timing(seconds), "1,000 cells", details)


def measured(group: str, name: str, seconds: float, **details: Any) -> Record:
    name = f"{group}/{name}"
    return Record(group, name, "measured", seconds=timing(seconds), per="run", details=details)


def run(*records: Record, **changes: Any) -> Run:
    parts: dict[str, Any] = {
        "date": "2026-11-23T07:31:05+00:00",
        "device": {"type": "cpu", "name": "A processor (2 cores)", "slug": "a-processor"},
        "versions": {"python": "3.11"},
        "settings": {"dtype": "float32", "genes": list(GENES), "quick": True},
        "ceilings": {},
        "models": {
            WHOLE: {"ours": False, "parameters": 103, "published": 100, "cap": None},
            CAPPED: {"ours": False, "parameters": 53, "published": 53, "cap": CAP},
            OURS: {"ours": True, "parameters": 7, "published": None, "cap": None},
        },
        "records": list(records),
    }
    return Run(**parts | changes)


def runtime_run(**changes: Any) -> Run:
    """Ours is linear in the genes; one peer has a cap, the other loses its last point."""
    ours = {503: 0.6006, 1_009: 1.1066, 2_000: 2.0976}  # 97.6 µs per cell + 1 µs per gene
    capped, whole = {503: 100.0, 1_009: 210.0, 2_000: 211.0}, {503: 3.0, 1_009: 9.0, 2_000: None}
    return run(
        *(point(WHOLE, g, s, peak_bytes_per_cell=1e6 * g) for g, s in whole.items()),
        *(point(CAPPED, g, s, peak_bytes_per_cell=2e5 * min(g, CAP)) for g, s in capped.items()),
        *(point(OURS, g, s, peak_bytes_per_cell=0) for g, s in ours.items()),
        **changes,
    )


def kernel(op: str, case: str, method: str, rate: float, **details: Any) -> Record:
    return measured(
        "kernels", f"{op}/{case}/{method}", 1e-3, op=op, case=case, method=method,
        genes_per_second=rate, **details,
    )  # fmt: skip


def full_run(**changes: Any) -> Run:
    """Records of every group."""
    fast: dict[str, Any] = {
        "ours": True, "flops": 3e10, "intensity": 59.0, "bytes_per_second": 5e8,
        "roofline_share": 0.31, "error": 2e-6, "bound": 1e-5,
    }  # fmt: skip
    others = [
        measured(
            "training", OURS, 0.2, model=OURS, task="fine-tuning", cells=64, genes=997,
            cells_per_second=320.0,
        ),
        measured("training", WHOLE, 4.6, model=WHOLE, task="fine-tuning", cells=64, genes=997),
        kernel("encoder", "503", "ours", 1.1e7, **fast),
        kernel("encoder", "1,009", "ours", 1.3e7, **fast | {"flops": 7e10, "intensity": 61.0}),
        kernel("encoder", "503", "padded", 2e5),
        kernel("decoder", "503", "ours", 3e6, **fast | {"intensity": 131.0}),
        measured(
            "loader", "CellLoader", 1.0, system="CellLoader", layout="tokens",
            nonzeros_per_second=4.7e8, cells_per_second=3e5,
        ),
        *(
            measured(
                "atlas", str(cells), cells / 7_000, cells=cells, genes_per_cell=1_499,
                cells_per_second=7_000.0, peak_rss_bytes=53e7, output_bytes=cells * 8_192,
            )
            for cells in (10_000, 100_000)
        ),
        measured("startup", "import", 0.31, what="import cellpatch_fast", limit=1.5),
        measured("startup", "help", 0.61, what="cellpatch --help", limit=0.5),
        Record("runtime", "runtime/scBERT", "skipped", "performer-pytorch is missing"),
    ]  # fmt: skip
    ceilings = {"copy bytes/s": 2e10, "L2 copy bytes/s": None, "matrix FLOP/s": 1.4e11}
    records = [*runtime_run().records, *others]
    return run(**{"records": records, "ceilings": ceilings} | changes)
