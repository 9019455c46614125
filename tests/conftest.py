"""What several test files stand on: generated data trees, the program run in this process, the real data."""

import importlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from exp.runtime.errors import run_and_report
from exp.runtime.interrupt import SIGNALS

if TYPE_CHECKING:
    import torch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as exp/main.py; before PyTorch is imported

ROOT = Path(__file__).resolve().parents[1]
TINY_SETTINGS = (
    "model.decoder_channels=[8,8,8,8,8]",
    "data.crop_size=[32,32]",
    "data.train_samples=8",
    "data.val_samples=3",
    "schedule.train_iters=3",
    "schedule.batch_size=4",
    "schedule.num_workers=0",
    "schedule.log_iters=1",
)
TINY = [
    "--model_yaml",
    "unet_mobilenetv3_small_100",
    "--data_yaml",
    "shapes",
    "--set",
    *TINY_SETTINGS,
    "schedule.save_iters=2",
]
TINY_RUN = "unet_mobilenetv3_small_100.shapes.ce.quickstart.adamw_lr6e-4"


@pytest.fixture
def gpu() -> Iterator["torch.device"]:
    """The CUDA device, without TF32, with cuDNN's deterministic algorithms. Skips where there is none.

    RANKSEG_TEST_DEVICE=cpu runs the same tests on a CPU, to see that they run at all.
    """
    import torch

    if os.environ.get("RANKSEG_TEST_DEVICE") == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    exact = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    before = {name: getattr(torch.backends.cudnn, name) for name in exact}
    _set_cudnn(exact)
    yield torch.device("cuda", 0)
    _set_cudnn(before)


def _set_cudnn(values: dict[str, bool]) -> None:
    import torch

    for name, value in values.items():
        setattr(torch.backends.cudnn, name, value)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> "torch.device":
    """The CPU, then the CUDA device, for what must hold on both."""
    import torch

    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("gpu")


@pytest.fixture(autouse=True)
def signals():
    """A program that leaves because it was asked to ignores further signals; in this process the next test is to have
    them, and what it starts inherits what is ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def program(monkeypatch, capsys):
    """A function: flags -> (exit status, stdout, stderr) of exp/main.py, run in this process."""
    from exp.main import main

    def run(*flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, flags)])
        capsys.readouterr()
        try:
            status = run_and_report(main)
        except SystemExit as exit_:  # argparse
            status = exit_.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def script(monkeypatch, capsys):
    """A function: name, flags -> (exit status, stdout, stderr) of scripts/<name>.py, run in this process."""

    def run(name: str, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name.rpartition('.')[2]}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            status = run_and_report(importlib.import_module(f"scripts.{name}").main)
        except SystemExit as exit_:  # argparse
            status = exit_.code
        return status, *capsys.readouterr()

    return run


def free_port() -> int:
    """A port of the loopback device that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def scene(rng: np.random.Generator, height: int, width: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of two regions that differ in colour, with its label."""
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = rng.integers(1, num_classes)
    image = rng.integers(0, 80, (height, width, 3)) + 20 * label[..., None]
    return image.clip(0, 255).astype(np.uint8), label


@pytest.fixture
def voc_dir(tmp_path: Path) -> Path:
    """A data_dir with a VOCdevkit of 6 trainaug and 3 val images of different sizes."""
    from tests.data.trees import write_voc

    write_voc(tmp_path / "data", {"trainaug": 6, "val": 3})
    return tmp_path / "data"


@pytest.fixture
def camvid_dir(tmp_path: Path) -> Path:
    """A data_dir with a CamVid of 6 train and 3 val images of 48 x 64; label 11 is void."""
    from tests.data.trees import write_camvid

    write_camvid(tmp_path / "data", {"train": 6, "val": 3})
    return tmp_path / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that RANKSEG_TEST_DATA names."""
    folder = os.environ.get("RANKSEG_TEST_DATA")
    if not folder:
        pytest.skip("RANKSEG_TEST_DATA names no folder with real data")
    return Path(folder)
