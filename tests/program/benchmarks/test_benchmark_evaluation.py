import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_benchmark_of_the_evaluation_runs_and_adds_up(tmp_path: Path):
    output = tmp_path / "figures.json"
    command = [
        sys.executable,
        "scripts/benchmarks/benchmark_evaluation.py",
        "--images",
        "2",
        "--threads",
        "1",
        "--output",
        output,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, three = json.loads(output.read_text()).values()
    assert set(three["milliseconds_per_image"]) - set(two["milliseconds_per_image"]) == {"rankseg_rma_iou"}
    for figures in (two, three):
        assert sum(figures["milliseconds_per_image"].values()) == pytest.approx(figures["whole"])
        assert 0 < figures["besides_forward"] < 0.6
    assert "besides the forward pass" in done.stdout
