import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 2])
def test_ours_is_four_times_as_fast_at_a_third_of_the_memory(tmp_path: Path, axis: int):
    """On 80 slices; the figures of 200 are those of the docs."""
    output = tmp_path / "times.json"
    flags = ["--axis", axis, "--slices", 80, "--repeats", 1, "--output", output]
    command = [sys.executable, ROOT / "scripts" / "benchmarks" / "benchmark_prepare.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for suffix, ways in json.loads(output.read_text()).items():
        ours, naive = ways["ours"], ways["float64"]
        assert naive["seconds"] > 4 * ours["seconds"], suffix
        assert naive["peak_bytes"] > 3 * ours["peak_bytes"], suffix
