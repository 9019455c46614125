"""The ways that scripts/benchmarks/benchmark_metrics.py times count the same, and it runs to its end."""

import json
from pathlib import Path

import pytest
import torch


def test_every_way_counts_the_same_and_the_figures_are_written(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from scripts.benchmarks import benchmark_metrics

    monkeypatch.setattr(benchmark_metrics, "SHAPES", {"camvid": (5, 16, 24)})
    monkeypatch.setattr(benchmark_metrics, "peak_memory", lambda name, shape: 0.0)
    threads = torch.get_num_threads()
    path = tmp_path / "figures.json"
    status, printed, err = script("benchmarks.benchmark_metrics", "--shapes", "camvid", "--rounds", 1, "--output", path)
    torch.set_num_threads(threads)
    assert status == 0, err
    figures = json.loads(path.read_text())
    assert figures["counts"]["camvid"].keys() == benchmark_metrics.WAYS.keys()
    assert all(row["ms"] > 0 for row in figures["counts"]["camvid"].values())
    assert "comparing two rules on 2,000 images" in printed
