"""Networks: encoder -> decoder -> heads."""

from exp.models.segmentor import Segmentor, build_model

__all__ = ["Segmentor", "build_model"]
