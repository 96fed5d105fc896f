"""The benchmarks of spatial domains run, are complete, and say what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_toy_run_of_quality(tmp_path: Path) -> None:
    from bench.spatial_methods import CEILING, METHODS
    from bench.spatial_scores import ARI, JUDGED

    output, folder = tmp_path / "toy.json", tmp_path / "scores"
    done = run("spatial.py", "--toy", "--folder", folder, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "starmap_mpfc_BZ5 is left out" in done.stderr
    results = json.loads(output.read_text())
    (summary,) = results["summaries"].values()
    assert list(summary["methods"]) == [CEILING, *METHODS]
    for row in summary["methods"].values():
        assert row["seeds"] == 2
        for measure in JUDGED:
            assert -0.5 <= row[measure]["median"] <= 1
        assert f"{row[ARI]['median']:.3f}" in done.stdout
    assert summary["methods"][CEILING][ARI]["median"] > 0.4  # layers are there to be found
    assert output.with_suffix(".md").read_text().strip() == done.stdout.strip()
    # what the folder holds is reported as it is, and nothing is measured
    again = run("spatial.py", "--toy", "--folder", folder, "--kept")
    assert again.stdout == done.stdout


def test_toy_run_of_speed(tmp_path: Path) -> None:
    output = tmp_path / "toy.json"
    done = run("spatial_speed.py", "--toy", "--output", output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert all(len(seconds) == 2 for seconds in results["small"].values())
    for row in [*results["large"].values(), *results["tiled"].values()]:
        assert row["seconds"] > 0
        assert row["peak bytes"] > row["bytes before"]
    assert results["domains"]["domains"] == 7
    assert output.with_suffix(".md").read_text().strip() == done.stdout.strip()


def test_plain_stagate_computes_what_ours_does() -> None:
    """Else the ratio of their times would compare different work."""
    import torch

    from bench.spatial_plain import PlainStagate, edges_of
    from bench.spatial_speed import tissue
    from cellpatch_fast.spatial.pieces import whole
    from cellpatch_fast.spatial.stagate import Stagate, StagateConfig

    expression, graph, _ = tissue(41, 29)
    plain, ours = PlainStagate(29, 13, 5), Stagate(StagateConfig(29, hidden=13, output=5))
    with torch.no_grad():
        plain.hidden_weight.copy_(ours.hidden_weight)
        plain.output_weight.copy_(ours.output_weight)
        plain.source.copy_(ours.source_attention[None])
        plain.target.copy_(ours.target_attention[None])
    x = torch.from_numpy(expression.toarray())
    error = (plain(x, edges_of(graph)) - x).square().sum()
    expected = ours.squared_error(whole(expression, graph))
    assert float(error.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_scores_are_of_the_domains_that_users_get() -> None:
    from sklearn.metrics import adjusted_rand_score

    from bench.spatial_data import Tissue
    from bench.spatial_scores import AGREEMENT, ARI, scored
    from cellpatch_fast.spatial.domains import find_domains
    from cellpatch_fast.synthetic.tissue import synthetic_tissue

    tissue = Tissue("tissue", synthetic_tissue(150, layers=3, genes=50))
    layers = tissue.layers
    rows = np.random.default_rng(0).normal(size=(len(layers), 5)) + layers[:, None]
    score = scored(tissue, rows, seed=7, starts=5)
    domains = find_domains(rows, 3, seed=7, starts=5)
    assert score[ARI] == adjusted_rand_score(layers, domains.labels)
    assert score[AGREEMENT] == pytest.approx(domains.agreement)


def test_spots_without_a_layer_are_not_judged() -> None:
    from bench.spatial_data import Tissue
    from bench.spatial_scores import ARI, scored
    from cellpatch_fast.synthetic.tissue import synthetic_tissue

    spots = synthetic_tissue(150, layers=3, genes=50)
    layers = spots.obs["layer"].astype(str)
    codes = np.array([int(name[-1]) for name in layers])
    rows = codes[:, None] + 1e-3 * np.random.default_rng(0).normal(size=(len(codes), 2))
    layers.iloc[:20] = "nan"
    spots.obs["layer"] = layers
    tissue = Tissue("tissue", spots)
    assert tissue.count == 3
    assert tissue.annotated.sum() == len(codes) - 20
    assert scored(tissue, rows, seed=0, starts=5)[ARI] == 1.0


def test_chaos_is_the_spacing_where_domains_are_compact() -> None:
    from bench.spatial_scores import chaos

    places = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), -1).reshape(-1, 2)
    compact = (places[:, 0] >= 10).astype(int)
    spacing = 1 / places[:, 0].std()
    assert chaos(places, compact) == pytest.approx(spacing)
    checkered = (places.sum(axis=1) % 2).astype(int)
    assert chaos(places, checkered) == pytest.approx(np.sqrt(2) * spacing)


def test_differences_are_taken_seed_by_seed() -> None:
    from bench.spatial_report import difference

    scores = {
        "one": {0: {"ARI": 0.5}, 1: {"ARI": 0.9}, 2: {"ARI": 0.1}},
        "other": {0: {"ARI": 0.4}, 1: {"ARI": 0.7}},
    }
    assert difference(scores, "one", "other")["median"] == pytest.approx(0.15)


def test_targets_are_met_or_missed_by_medians() -> None:
    from bench.spatial_methods import CELLPATCH, SMOOTHED, STAGATE
    from bench.spatial_report import targets

    def seeds(*aris: float) -> dict[int, dict[str, float]]:
        return {seed: {"ARI": ari} for seed, ari in enumerate(aris)}

    scores = {SMOOTHED: seeds(0.8), STAGATE: seeds(0.5, 0.6), CELLPATCH[0]: seeds(0.6, 0.59)}
    (on_starmap,) = targets({"starmap_mpfc_BZ5": scores})
    assert on_starmap["margin"] == pytest.approx(-0.205)
    (on_dlpfc,) = targets({"dlpfc": scores})
    assert on_dlpfc["margin"] == pytest.approx(0.595 - 0.57)


def test_an_unknown_row_is_refused() -> None:
    done = run("spatial.py", "--methods", "magic")
    assert done.returncode == 2
    assert "no method 'magic': choose of" in done.stderr
