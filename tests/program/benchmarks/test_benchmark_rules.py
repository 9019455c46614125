import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "benchmarks" / "benchmark_rules.py"


@pytest.fixture
def benchmark():
    from scripts.benchmarks import benchmark_rules

    return benchmark_rules


def test_maps_of_a_network_are_measured_by_every_rule(tmp_path: Path):
    prob = np.random.default_rng(0).random((3, 16, 20), np.float32)
    np.save(tmp_path / "street.npy", prob / prob.sum(0))
    output = tmp_path / "rules.json"
    flags = ["--maps", tmp_path, "--threads", "1", "2", "--repeats", "1", "--no-memory", "--output", output]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| argmax |" in done.stdout
    assert "Measured on a CPU only" in done.stdout
    (result,) = json.loads(output.read_text())["results"]
    assert result["name"] == "street"
    assert result["shape"] == [1, 3, 16, 20]
    assert ("rankseg screening dice" in done.stdout) != ("Without the package" in done.stdout)
    names = ["max", "argmax", "amax (one read)", "ours dice", "ours iou float16", "sort-based dice", "sort-based iou"]
    for threads in ("1", "2"):
        for seconds in (result["seconds"][threads], result["under_load"][threads]):
            assert all(seconds[name] > 0 for name in names)


def test_busy_processes_end_with_the_load(benchmark):
    started = []
    with pytest.MonkeyPatch.context() as patch:
        popen = subprocess.Popen
        patch.setattr(benchmark.subprocess, "Popen", lambda command: started.append(popen(command)) or started[-1])
        with benchmark.busy_cores(2):
            assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


def test_real_maps_are_probabilities_of_the_labels_size(benchmark, real_data: Path):
    maps = {name.rsplit("/", 1)[0]: make() for name, make in benchmark.real_maps(real_data, 1)}
    assert maps
    for name, prob in maps.items():
        torch.testing.assert_close(prob.sum(1), torch.ones_like(prob[:, 0]))
        assert prob.shape[1] == (21 if name.startswith("voc") else 11)


@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_the_sort_based_rule_is_the_papers(benchmark, metric: str):
    from rankseg_rma import rankseg_rma

    prob = benchmark.realistic_map((2, 6, 40, 50), 0.5)
    ours = rankseg_rma(prob, metric, unassigned="first", contested="all")
    assert (benchmark.sort_rma(prob, metric) != ours).float().mean() < 1e-3


def test_generated_maps_have_the_stated_share_of_pruned_classes(benchmark):
    prob = benchmark.realistic_map((1, 21, 128, 128), 0.89)
    torch.testing.assert_close(prob.sum(1), torch.ones(1, 128, 128))
    assert abs(benchmark.describe_map(prob)["pruned_classes"] - 0.89) < 0.03


def test_memory_is_measured_in_a_process_of_its_own(benchmark):
    prob = benchmark.realistic_map((1, 4, 512, 512), 0.0)
    peaks = benchmark.measure_memory(prob, ["argmax", "sort-based dice"])
    assert peaks["argmax"] >= 512 * 512 * 8
    assert peaks["sort-based dice"] > 2 * prob.numel() * 4
