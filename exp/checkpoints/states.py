"""A saved state beside the one that this run would save: of the same kind, or not to be loaded."""

import math
from typing import Any

from torch import Tensor


def find_difference(found: Any, expected: Any, where: str) -> str | None:
    """The first place where two states of nested dicts, lists and tensors are of other kinds; None: nowhere.

    Kinds are the keys of dicts, the lengths of lists, the shapes and dtypes of tensors, and the types of all else. A
    number has to be finite; what it is may differ.
    """
    if isinstance(expected, Tensor):
        got = _describe_tensor(found) if isinstance(found, Tensor) else type(found).__name__
        return None if got == _describe_tensor(expected) else f"{where}: got {got}, not {_describe_tensor(expected)}"
    if type(found) is not type(expected):
        return f"{where}: got {type(found).__name__}, not {type(expected).__name__}"
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            surplus, missing = sorted(map(str, found.keys() - expected.keys())), expected.keys() - found.keys()
            names = surplus or sorted(map(str, missing))
            return f"{where}: {'unknown' if surplus else 'no'} {names[0][:120]}"
        parts = [(key, found[key], expected[key]) for key in expected]
    elif isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            return f"{where}: got {len(found)} entries, not {len(expected)}"
        parts = list(zip(range(len(found)), found, expected))
    elif isinstance(expected, float) and not math.isfinite(found):
        return f"{where}: got {found}, not a finite number"
    else:
        return None
    return next((text for key, a, b in parts if (text := find_difference(a, b, f"{where}.{key}"))), None)


def _describe_tensor(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
