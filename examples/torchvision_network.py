"""A segmentation network of torchvision, with a rule in place of argmax.

    python examples/torchvision_network.py lraspp_mobilenet_v3_large photo.jpg mask.png
    python examples/torchvision_network.py lraspp_mobilenet_v3_large photo.jpg mask.png weights.pth

Without a file the weights COCO_WITH_VOC_LABELS_V1 are fetched: VOC's 21 classes. Writes a PNG of class numbers.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import get_model, get_model_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone; not needed after `pip install .`
from rankseg_rma import rankseg_levelset


def load(name: str, path: str | None = None) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A name of torchvision -> its network, and what it does to images before. path: a state dict, as .pth."""
    weights = get_model_weights(name)["COCO_WITH_VOC_LABELS_V1"]
    if path is None:
        return get_model(name, weights=weights).eval(), weights.transforms()
    state = torch.load(path, map_location="cpu", weights_only=True)
    aux = {"aux_loss": True} if any(key.startswith("aux_classifier.") for key in state) else {}
    model = get_model(name, weights=None, weights_backbone=None, num_classes=21, **aux)
    model.load_state_dict(state)
    return model.eval(), weights.transforms()


@torch.inference_mode()
def segment(
    model: torch.nn.Module, preprocess: torch.nn.Module, image: Image.Image, rule=rankseg_levelset
) -> np.ndarray:
    """An RGB image -> (H, W) int64 labels: the logits go back to the image's size before anything is decided."""
    logits = model(preprocess(image)[None])["out"]
    logits = F.interpolate(logits, image.size[::-1], mode="bilinear", align_corners=False)
    return rule(logits.softmax(dim=1))[0].numpy()


def main() -> None:
    name, photo, mask, *path = sys.argv[1:]
    model, preprocess = load(name, *path)
    with Image.open(photo) as image:
        label = segment(model, preprocess, image.convert("RGB"))
    with open(mask, "xb") as file:  # nothing that is there already is replaced
        Image.fromarray(label.astype(np.uint8)).save(file, format="PNG")


if __name__ == "__main__":
    main()
