"""The states of all random generators of a process as tensors."""

import random

import numpy as np
import torch
from torch import Tensor


def seed_globals(seed: int) -> None:
    """Seed the generators that nothing here draws from, but a library might: NumPy's global one and Python's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def get_random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's generators (of the CPU and of `device`), NumPy's global one and Python's."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    assert name == "MT19937"
    version, words, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if python_gauss is None else python_gauss, dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on from what get_random_state returned; the GPU's only where there is one."""
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
