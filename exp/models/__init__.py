"""Networks: encoder -> decoder -> heads."""

from exp.models.decoders import POOLING_DECODERS
from exp.models.segmentor import Segmentor, build_model

__all__ = ["POOLING_DECODERS", "Segmentor", "build_model"]
