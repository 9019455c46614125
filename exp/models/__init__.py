"""Networks: encoder -> decoder -> heads."""

from exp.models.segmentor import Segmentor, build_model
from exp.models.weights import load_network_weights

__all__ = ["Segmentor", "build_model", "load_network_weights"]
