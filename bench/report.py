"""What `bench.kernels` measured, as Markdown, and measured against what was aimed for.

Works on the results as they are in the JSON file, so that a report can be made again from it.
Targets are about a GPU: without one, nothing is said to be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.batches import CASES, LONGEST

ROOFLINE_SHARE, TIMES_BASELINE, TIMES_ORIGINAL = 0.5, 3.0, 100.0
CELLS_PER_SECOND = 3e6  # of 1,000 genes, on an H200
MEMORY_RATIO = 1.1
Target = tuple[str, float, float | None, bool]  # name, aim, found, whether more is better
MAIN_CASES = [case.name for case in CASES if case.main]


def measured(results: dict[str, Any], computes: str, case: str | None = None) -> list[Any]:
    """Rows with a speed, launched in the ordinary way."""
    return [
        row
        for row in results["rows"]
        if row["status"] == "measured"
        and row["computes"] == computes
        and not row["replayed"]
        and case in (None, row["case"])
    ]


def best(rows: Iterable[Any]) -> Any:
    """The row with the most genes/s; None of none."""
    return max(rows, key=lambda row: row["genes_per_second"], default=None)


def ours(results: dict[str, Any], computes: str, case: str) -> Any:
    """Our row as users get it: split or not as the kernels choose."""
    return best(r for r in measured(results, computes, case) if r["method"] == "ours")


def ratio(results: dict[str, Any], computes: str, case: str) -> float | None:
    """Ours against the best of the others; against the original as it is for the encoder."""
    rows = [row for row in measured(results, computes, case) if not row["ours"]]
    if computes.startswith("encoder"):
        rows = [row for row in rows if row["form"] == "float32"]
    ours_row, other = ours(results, computes, case), best(rows)
    return ours_row and other and ours_row["genes_per_second"] / other["genes_per_second"]


def share(results: dict[str, Any], computes: str, case: str) -> float | None:
    """Of the roofline, which is a GPU's."""
    ours_row = ours(results, computes, case)
    if ours_row is None or results["roofline genes/s"] is None:
        return None
    return ours_row["genes_per_second"] / results["roofline genes/s"]["roofline"]


def memory_ratio(results: dict[str, Any], case: str) -> float | None:
    """(inputs + tables + what the encoder allocates) / (inputs + tables + features)."""
    ours_row = ours(results, "encoder", case)
    if not ours_row or ours_row["extra_bytes"] is None:
        return None
    fixed = results["table bytes"] + 3 * ours_row["genes"] + 8 * (ours_row["cells"] + 1)
    return (fixed + ours_row["extra_bytes"]) / (fixed + ours_row["result_bytes"])


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, target, what was measured (None if it was not) and whether that is enough."""
    thousand = ours(results, "encoder", "1,000")
    entries: list[Target] = [
        (f"{computes}: share of the roofline, least of all lengths", ROOFLINE_SHARE, value, True)
        for computes in ("cross-attention", "encoder")
        for value in [worst(lambda case, c=computes: share(results, c, case), min)]  # type: ignore[misc]
    ]
    entries += [
        (
            "cross-attention: times the best baseline, least of all lengths",
            TIMES_BASELINE,
            worst(lambda case: ratio(results, "cross-attention", case), min),
            True,
        ),
        (
            "encoder: times the padded original, least of all lengths",
            TIMES_ORIGINAL,
            worst(lambda case: ratio(results, "encoder", case), min),
            True,
        ),
        (
            "encoder: cells/s at 1,000 genes (target for an H200)",
            CELLS_PER_SECOND,
            thousand and thousand["cells_per_second"],
            True,
        ),
        (
            "encoder: memory over inputs + outputs + tables, largest of all lengths",
            MEMORY_RATIO,
            worst(lambda case: memory_ratio(results, case), max),
            False,
        ),
        (
            f"encoder: the same with one cell of {LONGEST:,} genes",
            MEMORY_RATIO,
            memory_ratio(results, f"1,000, one of {LONGEST:,}"),
            False,
        ),
    ]
    return judge(results, entries)


def worst(of_case: Callable[[str], float | None], choose: Any) -> float | None:
    """The least or largest of all lengths; None unless it is known of every one."""
    values = [of_case(case) for case in MAIN_CASES]
    measured_values = [value for value in values if value is not None]
    return choose(measured_values) if len(measured_values) == len(values) else None


def judge(results: dict[str, Any], entries: list[Target]) -> list[dict[str, Any]]:
    """Whether targets are met, where that was measured on a GPU."""
    on_gpu = "compute capability" in results["machine"] and not results["toy"]
    return [
        {
            "name": name,
            "target": target,
            "measured": value if on_gpu else None,
            "met": None
            if value is None or not on_gpu
            else (value >= target if at_least else value < target),
        }
        for name, target, value, at_least in entries
    ]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, its first column to the left."""
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    return ["", *lines, *(f"| {' | '.join(row)} |" for row in rows)]


def number(value: float | None, digits: str = ".3g") -> str:
    return "–" if value is None else f"{value:{digits}}"


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = heading(results)
    for computes in ("cross-attention", "encoder"):
        lines += by_case(results, computes)
    for part in (memory, replays, errors, missing):
        lines += part(results)
    return "\n".join(lines)


def heading(results: dict[str, Any]) -> list[str]:
    """The machine, what was aimed for, and what the device can do."""
    machine = results["machine"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"{results['tables']} tables, {results['date']}"
    ]
    if results["toy"]:
        lines += ["", "**Toy sizes: this shows that everything runs and says nothing of speed.**"]
    lines += table(
        ["target", "aim", "measured", "met"],
        [
            [
                entry["name"],
                f"{entry['target']:,g}",
                number(entry["measured"], ",.3g"),
                {None: "not measured", True: "yes", False: "**no**"}[entry["met"]],
            ]
            for entry in results.get("targets", [])
        ],
    )
    lines += table(
        ["ceiling", "rate"], [[k, number(v, ".3e")] for k, v in results["ceilings"].items()]
    )
    if results["roofline genes/s"]:
        lines += table(
            ["roofline, by resource", "million genes/s"],
            [[k, f"{v / 1e6:,.1f}"] for k, v in results["roofline genes/s"].items()],
        )
    return lines


def by_case(results: dict[str, Any], computes: str, *, roofline: bool = True) -> list[str]:
    """Million genes/s (p20 to p80 are in the JSON) of every method, a column per case."""
    rows = measured(results, computes)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    methods = list(dict.fromkeys((row["method"], row["form"]) for row in rows))
    rates = {
        (row["method"], row["form"], row["case"]): row["genes_per_second"] / 1e6 for row in rows
    }
    body = [
        [", ".join(filter(None, method)), *(number(rates.get((*method, c)), ",.4g") for c in cases)]
        for method in methods
    ]
    if computes.startswith("encoder"):
        our_rows = [ours(results, computes, case) for case in cases]
        body += [
            ["ours, cells/s", *(number(o and o["cells_per_second"], ",.0f") for o in our_rows)]
        ]
    if roofline:
        shares = [number(share(results, computes, case), ".1%") for case in cases]
        body += [["ours, share of the roofline", *shares]]
    other = "the original, float32" if computes.startswith("encoder") else "the best baseline"
    body += [
        [f"ours, times {other}", *(number(ratio(results, computes, c), ".3g") for c in cases)],
    ]
    return table([f"{computes}, million genes/s", *cases], body)


def memory(results: dict[str, Any]) -> list[str]:
    cases = dict.fromkeys(row["case"] for row in results["rows"])
    ratios = {case: memory_ratio(results, case) for case in cases}
    if not any(ratios.values()):
        return ["", "Memory: not measured (it needs a GPU)."]
    return table(
        ["encoder, cells", "memory over inputs + outputs + tables"],
        [[case, number(value, ".3f")] for case, value in ratios.items()],
    )


def replays(results: dict[str, Any]) -> list[str]:
    """Microseconds of a call, from Python and from a CUDA graph."""
    small = [case.name for case in CASES if case.replayed]
    rows = [row for row in results["rows"] if row["case"] in small and row["status"] == "measured"]
    body = [
        [
            row["case"],
            row["computes"],
            ", ".join(filter(None, (row["method"], row["form"]))),
            "CUDA graph" if row["replayed"] else "Python",
            *(f"{1e6 * row['seconds'][key]:,.1f}" for key in ("p20", "median", "p80")),
        ]
        for row in rows
    ]
    return table(["small batches", "computes", "method", "from", "p20 µs", "median", "p80"], body)


def errors(results: dict[str, Any]) -> list[str]:
    """Relative errors against float64, once for each method."""
    rows = {
        (row["computes"], row["method"], row["form"], "±100" in row["case"]): row
        for row in results["rows"]
        if row["error"] is not None
    }
    return table(
        ["relative error (worst cell)", "found", "allowed"],
        [
            [
                f"{computes}: {', '.join(filter(None, (method, form)))}"
                + (", scores to ±100" if wide else ""),
                f"{row['error']:.1e}",
                f"{row['bound']:.1e}",
            ]
            for (computes, method, form, wide), row in rows.items()
        ],
    )


def missing(results: dict[str, Any]) -> list[str]:
    """What has no speed, and why; cases with the same reason together."""
    reasons: dict[tuple[str, ...], list[str]] = {}
    for row in results["rows"]:
        if row["status"] != "measured":
            how = "from a CUDA graph" if row["replayed"] else ""
            name = ", ".join(filter(None, (row["method"], row["form"], how)))
            reasons.setdefault((row["computes"], name, row["status"], row["reason"]), []).append(
                row["case"]
            )
    every = len(dict.fromkeys(row["case"] for row in results["rows"]))
    return table(
        ["without a speed", "what", "why", "cases"],
        [
            [name, computes, f"{status}: {reason}", ("; ".join(c) if len(c) < every else "all")]
            for (computes, name, status, reason), c in reasons.items()
        ],
    )
