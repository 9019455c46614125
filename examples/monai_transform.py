"""The rules as post transforms of MONAI, in place of AsDiscrete(argmax=True): for arrays, and for dictionaries.

    from monai.transforms import Activationsd, Compose, Invertd, SaveImaged
    from examples.monai_transform import RankSEGd

    post = Compose([
        Activationsd(keys="pred", softmax=True),
        Invertd(keys="pred", ..., nearest_interp=False),  # probabilities first go back to the image's own grid
        RankSEGd(keys="pred", rule="rankseg_levelset"),
        SaveImaged(keys="pred", ...),
    ])

As a transform of decollated batches it takes one image, (C, *spatial) probabilities, and gives (1, *spatial) labels as
float32, which AsDiscrete does, too, with the metadata of what came in.
"""

import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_data_type, convert_to_dst_type

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone; not needed after `pip install .`
import rankseg_rma


class RankSEG(Transform):
    """(C, *spatial) probabilities -> (1, *spatial) float32 labels, or (C, *spatial) masks with allow_overlap=True.

    rule: "rankseg_rma" or "rankseg_levelset"; **options: its keyword arguments, opt_metric="iou" for one.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, rule: str = "rankseg_levelset", **options: Any) -> None:
        self.decide = rankseg_rma.RankSEG(rule, in_batch=False, **options)

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        prob, *_ = convert_data_type(img, torch.Tensor)  # a plain tensor, without the metadata
        label = self.decide(prob)
        if label.ndim < prob.ndim:  # not masks, which have their channels
            label = label[None]
        return convert_to_dst_type(label, img, dtype=torch.float32)[0]


class RankSEGd(MapTransform):
    """RankSEG for the items `keys` of a dictionary."""

    backend = RankSEG.backend

    def __init__(
        self,
        keys: KeysCollection,
        rule: str = "rankseg_levelset",
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = RankSEG(rule, **options)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        found = dict(data)
        for key in self.key_iterator(found):
            found[key] = self.transform(found[key])
        return found
