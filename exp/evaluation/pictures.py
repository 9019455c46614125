"""Panels: image, ground truth, the rules' predictions, and where each differs from the first rule."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from exp.data.base import IGNORE_INDEX
from exp.evaluation.evaluator import EvalResult, Evaluator
from exp.evaluation.metrics import count_rules, image_scores
from exp.rules.pooled import RuleThresholds

Palette = Sequence[tuple[int, int, int]]

IGNORE_COLOUR = (255, 255, 255)
BETTER, WORSE, BOTH_WRONG = (0, 114, 178), (213, 94, 0), (160, 160, 160)  # told apart by colour-blind readers too
FRAME = (120, 120, 120)
GAP, LINE, SWATCH = 6, 18, 12  # pixels: between tiles, height of a line of text, side of a legend's square
SMALLEST, LARGEST = 320, 640  # sides of a tile: smaller images are enlarged, larger ones made smaller

LegendEntry = tuple[tuple[int, int, int] | None, str]  # no colour: text alone


def colour_labels(label: np.ndarray, palette: Palette) -> np.ndarray:
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


def blend_labels(image: np.ndarray, label: np.ndarray, palette: Palette, opacity: float = 0.55) -> np.ndarray:
    """(H, W, 3) uint8 image and (H, W) labels -> (H, W, 3) uint8: the labels' colours over the image.

    Class 0 stays clear where it is drawn in black, the colour of a background.
    """
    colours = colour_labels(label, palette)
    clear = (label == IGNORE_INDEX) | ((label == 0) & (tuple(palette[0]) == (0, 0, 0)))
    weight = np.where(clear, 0, opacity)[..., None]
    return (image * (1 - weight) + colours * weight).round().astype(np.uint8)


def draw_panel(
    image: np.ndarray,
    label: np.ndarray,
    preds: Mapping[str, np.ndarray],
    palette: Palette,
    *,
    classes: Sequence[str],
    captions: Mapping[str, str] | None = None,
    title: str = "",
) -> np.ndarray:
    """(H, W, 3) uint8 image, (H, W) label, predictions by rule -> (H', W', 3) uint8 with captions.

    Two tiles per column: the image over the ground truth; the first rule over a legend; every further rule over where
    it differs from the first. captions: what stands in place of a rule's name.
    """
    captions, base = captions or {}, next(iter(preds))
    columns = [[("image", image), ("ground truth", colour_labels(label, palette))]]
    for name, pred in preds.items():
        tiles = [(captions.get(name, name), colour_labels(pred, palette))]
        if name != base:
            tiles.append((f"{name} against {base}", colour_differences(label, preds[base], pred)))
        columns.append(tiles)
    size = tile_size(*image.shape[:2])
    panel = _paste_columns(columns, size, title)
    present = np.unique(np.stack([label, *preds.values()]))
    entries = [(palette[c], classes[c]) for c in present if c != IGNORE_INDEX]
    entries += [(IGNORE_COLOUR, "ignored")] if IGNORE_INDEX in present else []
    if len(preds) > 1:
        differences = [(BETTER, f"right, {base} wrong"), (WORSE, f"wrong, {base} right"), (BOTH_WRONG, "both wrong")]
        entries = [*differences, (None, ""), *entries]
    _draw_legend(panel, (size[0] + GAP, 2 * LINE + size[1] + GAP), size, entries)
    return np.asarray(panel)


def tile_size(height: int, width: int) -> tuple[int, int]:
    """An image's height and width -> the (width, height) at which its tiles are drawn."""
    longest = max(height, width)
    scale = LARGEST / longest if longest > LARGEST else max(1, round(SMALLEST / longest))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _paste_columns(columns: list[list[tuple[str, np.ndarray]]], size: tuple[int, int], title: str) -> Image.Image:
    """Columns of one or two (caption, (H, W, 3) pixels) -> a white panel with all of them side by side."""
    width, height = size
    across = len(columns) * (width + GAP) - GAP
    panel = Image.new("RGB", (across, LINE + 2 * (LINE + height + GAP) - GAP), "white")
    _write(panel, (0, 0), across, title)
    for i, tiles in enumerate(columns):
        for row, (caption, pixels) in enumerate(tiles):
            left, top = i * (width + GAP), LINE + row * (LINE + height + GAP)
            _write(panel, (left, top), width, caption)
            shrinks = caption == "image" and pixels.shape[1] > width
            how = Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST
            panel.paste(Image.fromarray(pixels).resize(size, how), (left, top + LINE))
            frame = (left, top + LINE, left + width - 1, top + LINE + height - 1)
            ImageDraw.Draw(panel).rectangle(frame, outline=FRAME)  # ignored pixels are as white as the page
    return panel


def _draw_legend(
    panel: Image.Image, corner: tuple[int, int], size: tuple[int, int], entries: list[LegendEntry]
) -> None:
    """Coloured squares with their meaning from `corner` (left, top) on, in columns; as many as the tile holds."""
    rows = max(1, (size[1] + LINE) // LINE)
    width = max(110, size[0] // -(-len(entries) // rows))
    for i, (colour, text) in enumerate(entries[: rows * max(1, size[0] // width)]):
        left, top = corner[0] + i // rows * width, corner[1] + i % rows * LINE
        square = (left + 2, top + 3, left + 2 + SWATCH, top + 3 + SWATCH)
        if colour is not None:
            ImageDraw.Draw(panel).rectangle(square, fill=tuple(colour), outline=FRAME)
        _write(panel, (left + SWATCH + 6, top), width - SWATCH - 8, text)


def _write(panel: Image.Image, corner: tuple[int, int], width: int, text: str) -> None:
    """One line of text, its end left out where it is wider than `width` pixels."""
    font, draw = ImageFont.load_default(13), ImageDraw.Draw(panel)
    while text and draw.textlength(text, font) > width - 2:
        text = text[:-1]
    draw.text((corner[0] + 1, corner[1] + 1), text, fill="black", font=font)


def choose_pictures(results: Sequence[EvalResult], metric: str, num_images: int, seed: int) -> dict[str, list[int]]:
    """Results on the same images -> the indices of `gain`, `loss` and `random`, up to num_images of each.

    gain, loss: where the last rule's per-image `metric` is above or below the first's, the largest difference first;
    empty for one rule. random: by the seed, and none of the others while there are enough images.
    """
    num_all = len(results[0].names)
    gain = np.nan_to_num(image_scores(results[-1].counts)[metric] - image_scores(results[0].counts)[metric])
    order = np.argsort(-gain, kind="stable")
    chosen = {
        "gain": [int(i) for i in order if gain[i] > 0][:num_images],
        "loss": [int(i) for i in order[::-1] if gain[i] < 0][:num_images],
    }
    taken = {*chosen["gain"], *chosen["loss"]}
    shuffled = np.random.default_rng(seed).permutation(num_all).tolist()
    chosen["random"] = sorted(shuffled, key=lambda i: i in taken)[:num_images]
    return chosen


def predict_panel(
    evaluator: Evaluator, model: nn.Module, thresholds: RuleThresholds, index: int, metric: str | None = None
) -> np.ndarray:
    """One image of the data set under every rule -> its panel. The model is in eval mode.

    metric: the per-image score that the rules' captions tell.
    """
    dataset, item = evaluator.dataset, evaluator.dataset[index]
    case = dataset.samples[index].case
    preds = {name: pred.cpu() for name, pred in evaluator.decide(model, item.image[None], thresholds, case).items()}
    captions = {}
    if metric is not None:
        scores = image_scores(count_rules(list(preds.values()), item.label, len(dataset.classes)).numpy())[metric]
        captions = {name: f"{name}: {metric} {score:.1f}" for name, score in zip(preds, scores)}
    return draw_panel(
        dataset.display(item.image.numpy()),
        item.label.numpy(),
        {name: pred.numpy() for name, pred in preds.items()},
        dataset.palette,
        classes=dataset.classes,
        captions=captions,
        title=dataset.samples[index].name,
    )


def save_panel(panel: np.ndarray, folder: Path, name: str) -> Path:
    """Write <folder>/<name>.png; an older picture of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('/', '_')}.png"
    Image.fromarray(panel).save(path)
    return path
