"""Networks: encoder -> decoder -> heads."""

import sys

from exp.runtime.errors import InputError

if sys.flags.optimize > 1:
    raise InputError("python -OO: got no docstrings, expected them: segmentation_models_pytorch does not load without")

from exp.models.segmentor import Segmentor, build_model, describe_origin
from exp.models.weights import load_network_weights

__all__ = ["Segmentor", "build_model", "describe_origin", "load_network_weights"]
