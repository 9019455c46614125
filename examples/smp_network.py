"""A trained network of segmentation_models_pytorch, with a rule in place of argmax.

    python examples/smp_network.py smp-hub/segformer-b0-512x512-ade-160k photo.jpg mask.png
    python examples/smp_network.py my_network/ photo.jpg mask.png     # a folder that save_pretrained wrote

Writes a PNG of class numbers. Needs segmentation-models-pytorch and Pillow.
"""

import sys
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone; not needed after `pip install .`
from rankseg_rma import rankseg_levelset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as most of its networks are trained with
STRIDE = 32  # the sides that its networks take are multiples of it


@torch.inference_mode()
def segment(model: torch.nn.Module, image: np.ndarray, rule=rankseg_levelset) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) int64 labels, on the model's device. H and W are arbitrary."""
    height, width = image.shape[:2]
    x = torch.from_numpy(image.transpose(2, 0, 1)).to(next(model.parameters()).device)[None] / 255
    x = (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
    x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE))
    logits = model(x)[..., :height, :width]
    return rule(logits.float().softmax(dim=1))[0].cpu().numpy()


def main() -> None:
    source, photo, mask = sys.argv[1:]
    model = smp.from_pretrained(source).eval()
    with Image.open(photo) as image:
        label = segment(model, np.array(image.convert("RGB")))
    with open(mask, "xb") as file:  # nothing that is there already is replaced
        Image.fromarray(label.astype(np.uint8)).save(file, format="PNG")


if __name__ == "__main__":
    main()
