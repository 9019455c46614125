import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def benchmark():
    from scripts.benchmarks import benchmark_loader

    return benchmark_loader


def test_both_orders_of_work_are_measured_on_the_same_files(benchmark, monkeypatch, tmp_path: Path, capsys):
    small = tuple(replace(case, size=(40, 60), crop_size=(48, 48), num_files=8) for case in benchmark.CASES)
    monkeypatch.setattr(benchmark, "CASES", small)
    output = tmp_path / "loader.json"
    flags = ["--rounds", "1", "--batches", "3", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark_loader.py", *flags])
    benchmark.main()
    assert "ours / paper's order" in capsys.readouterr().out
    results = json.loads(output.read_text())
    assert results.keys() == {"voc", "cityscapes"}
    for result in results.values():
        assert all(rate > 0 for rate in result["images_per_second"].values())


def test_the_papers_order_gives_a_normalised_crop_of_the_same_files(benchmark, tmp_path: Path):
    case = replace(benchmark.CASES[0], size=(40, 60), crop_size=(96, 128), num_files=8)
    benchmark.write_files(tmp_path / case.name, case)
    image, label = benchmark.PaperOrder(benchmark.open_folder(tmp_path, case, None), case.crop_size)[0, 0]
    assert image.shape == (3, 96, 128)
    assert label.shape == (96, 128)
    inside = (label != 255).numpy()
    assert 0 < inside.mean() < 1
    assert np.allclose(image.numpy()[:, ~inside], 0, atol=1e-6)  # the mean colour
