"""What the benchmark of spatial domains found, as tables, and measured against what was aimed for.

Works on the results as they are in the JSON file, so that a report can be made again from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from bench.quality_report import CONFIDENCE, estimate, interval
from bench.report import number, table
from bench.spatial_data import GENERATED
from bench.spatial_methods import ALIASED, CELLPATCH, SMOOTHED, STAGATE
from bench.spatial_peers import UPSTREAM
from bench.spatial_scores import AGREEMENT, ARI, CHAOS, LABEL_FREE, MEASURES, MEDIAN_ARI, Score

COMPARED = (SMOOTHED, STAGATE)  # that others are compared to, seed by seed
LIKE_UPSTREAM, GAIN = 0.03, 0.02
Scores = Mapping[str, Mapping[int, Score]]  # by method and seed


def column(scores: Scores, method: str, measure: str) -> dict[int, float]:
    """A measure by seed."""
    return {int(seed): score[measure] for seed, score in scores[method].items()}


def difference(scores: Scores, method: str, other: str, measure: str = ARI) -> dict[str, Any]:
    """Of two methods, seed by seed, over the seeds that both have."""
    ones, others = (column(scores, name, measure) for name in (method, other))
    return estimate([value - others[seed] for seed, value in ones.items() if seed in others])


def summarise(scores: Scores) -> dict[str, Any]:
    """For one tissue, each method's estimates; and how labels follow what is told without them."""
    methods = {}
    for method, by_seed in scores.items():
        row: dict[str, Any] = {"seeds": len(by_seed)}
        for part in ("embedding, s", "clustering, s"):
            row[part] = statistics.median(column(scores, method, part).values())
        for measure in MEASURES:
            values = list(column(scores, method, measure).values())
            row[measure] = None if None in values else estimate(values)
        for other in COMPARED:
            row[f"to {other}"] = (
                difference(scores, method, other) if other in scores and other != method else None
            )
        methods[method] = row
    return {"methods": methods, "followed": followed(scores)}


def followed(scores: Scores) -> dict[str, float | None]:
    """Spearman correlation of each label-free measure with the adjusted Rand index.

    Over all methods and seeds whose domains come of a clustering. CHAOS is good where it is low.
    """
    rows = [s for by_seed in scores.values() for s in by_seed.values() if s[AGREEMENT] is not None]
    aris = [row[ARI] for row in rows]
    correlations: dict[str, float | None] = {}
    for measure in LABEL_FREE:
        values = [row[measure] for row in rows]
        varies = len(set(values)) > 1 and len(set(aris)) > 1
        correlations[measure] = float(spearmanr(values, aris).statistic) if varies else None
    return correlations


def targets(of_tissues: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """What was aimed for on each tissue, what was found, and by how much that is enough."""
    entries: list[dict[str, Any]] = []

    def add(tissue: str, text: str, aim: float, value: float, margin: float) -> None:
        entry = {"target": f"{tissue}: {text}", "aim": aim, "found": value, "margin": margin}
        entries.append(entry)

    for tissue, scores in of_tissues.items():
        medians = {name: statistics.median(column(scores, name, ARI).values()) for name in scores}
        if UPSTREAM in scores and ALIASED in scores:
            ours, theirs = medians[ALIASED], medians[UPSTREAM]
            text = f"{ALIASED}, as {UPSTREAM} but for {LIKE_UPSTREAM}"
            add(tissue, text, theirs, ours, LIKE_UPSTREAM - abs(ours - theirs))
        rows = [name for name in CELLPATCH if name in medians]
        if not rows or tissue == GENERATED:
            continue
        best = max(rows, key=lambda name: medians[name])
        text = f"{best} (the best CellPatch row)"
        if tissue.startswith("starmap") and SMOOTHED in medians:
            aim = medians[SMOOTHED]
            add(tissue, f"{text}, at least {SMOOTHED}", aim, medians[best], medians[best] - aim)
        elif tissue.startswith("dlpfc") and STAGATE in medians:
            aim = medians[STAGATE] + GAIN
            text += f", at least {STAGATE} + {GAIN}"
            add(tissue, text, aim, medians[best], medians[best] - aim)
    return entries


def report(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    machine, recipe = results["machine"], results["recipe"]
    lines = [
        f"{machine['processor']}, {machine['jobs']} at a time with one thread each, torch "
        f"{machine['torch']}, {results['date']}. STAGATE: {recipe['epochs']} epochs; presets that "
        f"train features {recipe['trained_epochs']} (published: 1,000); pretraining "
        f"{recipe['pretraining_epochs']} epochs on the tissue itself."
    ]
    if results["toy"]:
        lines += ["", "**Toy sizes: this shows that everything runs and says nothing of quality.**"]
    lines += target_table(results["targets"])
    for name, summary in results["summaries"].items():
        lines += tissue_table(name, results["tissues"][name], summary)
    return "\n".join([*lines, "", NOTE, *followed_table(results["summaries"])])


NOTE = (
    f"Medians over seeds, with {CONFIDENCE:.0%} bootstrap intervals of the median; differences are "
    "of the ARI, seed by seed. Seeds are of the same tissue: intervals say what chance decides, "
    'not how other tissues would fare. ARI and NMI: of the most likely of 20 mixtures; "median '
    'over starts": of what a single start gives. Agreement, CHAOS (low is smooth) and silhouette '
    "need no labels. **They do not select**: below is how they follow the ARI over methods and "
    "seeds. CPU s: of one thread, embedding and clustering."
)


def target_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    if not entries:
        return []
    rows = [
        [
            entry["target"],
            f"{entry['aim']:.3f}",
            f"{entry['found']:.3f}",
            f"{'met' if entry['margin'] >= 0 else '**missed**'} by {abs(entry['margin']):.3f}",
        ]
        for entry in entries
    ]
    return table(["target (median ARI over seeds)", "aim", "found", ""], rows)


def tissue_table(name: str, tissue: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    title = f"{name}: {tissue['spots']:,} spots x {tissue['genes']:,} genes, {tissue['domains']}"
    header = [f"{title} domains", "seeds", ARI, *(f"to {other}" for other in COMPARED)]
    rows = []
    for method, row in summary["methods"].items():
        cells = [method, str(row["seeds"]), interval(row[ARI])]
        for other in COMPARED:
            to = row[f"to {other}"]
            cells.append("" if to is None else interval(to, "+.3f"))
        for measure in MEASURES[1:]:
            digits = ".4f" if measure == CHAOS else ".2f"
            cells.append("" if row[measure] is None else number(row[measure]["median"], digits))
        rows.append([*cells, f"{row['embedding, s']:,.1f} + {row['clustering, s']:,.1f}"])
    return table([*header, MEDIAN_ARI.removeprefix("ARI, "), *MEASURES[2:], "CPU s"], rows)


def followed_table(summaries: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, *(number(summary["followed"][measure], "+.2f") for measure in LABEL_FREE)]
        for name, summary in summaries.items()
    ]
    return table(["Spearman correlation with the ARI", *LABEL_FREE], rows)
