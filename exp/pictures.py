"""Panels: image, truth, the rules' predictions, and where two of them differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import nn

from exp.data.base import IGNORE_INDEX
from exp.evaluate import EvalResult, Evaluator
from exp.metrics import image_scores

IGNORE_COLOUR = (255, 255, 255)
GAP, CAPTION_HEIGHT = 4, 14
BETTER, WORSE, BOTH_WRONG = (0, 114, 178), (213, 94, 0), (160, 160, 160)  # told apart by colour-blind readers too


def colour_labels(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """(H, W) labels in 0..C-1 or 255 -> (H, W, 3) uint8."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = IGNORE_COLOUR
    return table[label]


def colour_differences(label: np.ndarray, base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Labels and two predictions, (H, W) -> (H, W, 3) uint8: black where the two agree or the pixel is ignored.

    Blue: only `other` is right; orange: only `base` is right; grey: they differ and both are wrong.
    """
    differ = (base != other) & (label != IGNORE_INDEX)
    colours = np.zeros((*label.shape, 3), np.uint8)
    colours[differ] = BOTH_WRONG
    colours[differ & (other == label)] = BETTER
    colours[differ & (base == label)] = WORSE
    return colours


def draw_panel(
    image: np.ndarray, label: np.ndarray, preds: Mapping[str, np.ndarray], palette: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    """(H, W, 3) uint8 image, (H, W) label, a prediction a rule -> (H', W', 3) uint8 with captions.

    With two or more rules the last tile shows where the last one differs from the first.
    """
    tiles = {"image": image, "truth": colour_labels(label, palette)}
    tiles |= {name: colour_labels(pred, palette) for name, pred in preds.items()}
    if len(preds) > 1:
        names = list(preds)
        tiles["blue: better, orange: worse"] = colour_differences(label, preds[names[0]], preds[names[-1]])
    scale = max(1, round(320 / image.shape[1]))
    width, height = image.shape[1] * scale, image.shape[0] * scale
    panel = Image.new("RGB", (len(tiles) * (width + GAP) - GAP, height + CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(panel)
    for i, (name, tile) in enumerate(tiles.items()):
        left = i * (width + GAP)
        draw.text((left + 1, 1), name, fill="black")
        panel.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (left, CAPTION_HEIGHT))
    return np.asarray(panel)


def largest_gains(results: Sequence[EvalResult], metric: str, num_images: int) -> list[int]:
    """The indices of the images where the last rule gains most on the first; of one rule alone the first images."""
    if len(results) == 1:
        return list(range(min(num_images, len(results[0].names))))
    gain = image_scores(results[-1].counts)[metric] - image_scores(results[0].counts)[metric]
    return np.argsort(-np.nan_to_num(gain, nan=-np.inf), kind="stable")[:num_images].tolist()


def predict_panel(evaluator: Evaluator, model: nn.Module, index: int) -> np.ndarray:
    """One image of the data set under every rule -> its panel. The model is in eval mode."""
    item = evaluator.dataset[index]
    preds = {name: pred.cpu().numpy() for name, pred in evaluator.decide(model, item.image[None]).items()}
    return draw_panel(item.image.permute(1, 2, 0).numpy(), item.label.numpy(), preds, evaluator.dataset.palette)


def save_panel(panel: np.ndarray, folder: Path, name: str) -> Path:
    """Write <folder>/<name>.png; an older picture of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('/', '_')}.png"
    Image.fromarray(panel).save(path)
    return path
