"""A semantic segmentation network of transformers, with a rule in place of the argmax of its post-processing.

    python examples/transformers_network.py nvidia/segformer-b0-finetuned-ade-512-512 photo.jpg mask.png
    python examples/transformers_network.py my_network/ photo.jpg mask.png     # a folder that save_pretrained wrote

`post_process_semantic_segmentation` below takes the place of the image processor's method of that name. Writes a PNG of
class numbers. Needs transformers. Weights are read as data: safetensors, or a pytorch_model.bin with weights_only.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone; not needed after `pip install .`
from rankseg_rma import rankseg_levelset


def post_process_semantic_segmentation(
    outputs, target_sizes: Sequence[tuple[int, int]] | None = None, rule=rankseg_levelset
) -> list[Tensor]:
    """A network's outputs -> the (H, W) int64 labels of each image, at its target size (height, width).

    Logits are resized, then comes the softmax, then the rule. Networks of queries (MaskFormer, Mask2Former, OneFormer)
    have no logits by pixel, and their summed masks are no probabilities: ValueError.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None or logits.ndim != 4:
        raise ValueError("expected outputs with logits of (batch, classes, height, width)")
    labels = []
    for i, image in enumerate(logits.float().split(1)):
        if target_sizes is not None:
            size = tuple(int(side) for side in target_sizes[i])
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        labels.append(rule(image.softmax(dim=1))[0])
    return labels


def main() -> None:
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    source, photo, mask = sys.argv[1:]
    processor = AutoImageProcessor.from_pretrained(source)
    model = AutoModelForSemanticSegmentation.from_pretrained(source, weights_only=True).eval()
    with Image.open(photo) as file:
        image = file.convert("RGB")
    with torch.inference_mode():
        outputs = model(**processor(images=image, return_tensors="pt"))
    (label,) = post_process_semantic_segmentation(outputs, [image.size[::-1]])
    with open(mask, "xb") as file:  # nothing that is there already is replaced
        Image.fromarray(label.numpy().astype(np.uint8)).save(file, format="PNG")


if __name__ == "__main__":
    main()
