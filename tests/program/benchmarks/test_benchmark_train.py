import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_it_compares_the_loops_and_prints_a_ratio():
    """The default run takes minutes; here one block of each, which must at least train the same way."""
    flags = ["--rounds", "1", "--batch_size", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmarks" / "benchmark_train.py", *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["wall time", "processor time"]
    assert all("ratio of medians" in line for line in lines)
