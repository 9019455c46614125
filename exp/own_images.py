"""Images of the user's own -> masks and overlays, from a checkpoint alone: it knows its config and its classes."""

import colorsys
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from exp.checkpoint import Checkpoint, load_checkpoint, load_weights
from exp.config import DataConfig, ModelConfig, PredictConfig, TestConfig
from exp.data import DATASETS, build_normalize
from exp.data.base import show_values
from exp.data.decode import read_image
from exp.errors import InputError
from exp.inference import Inference, build_inference
from exp.masks import MaskFormat, mask_format, save_volume
from exp.models import build_model
from exp.output_folders import whole_file
from exp.pictures import Palette, blend_labels, tile_size
from exp.precision import Autocast
from exp.predict import Rule, build_rule
from exp.prepare.facts import VOLUMES
from exp.results import write_atomically
from exp.strict_yaml import build_dataclass
from exp.volumes import Volume, open_volume, resize_image, resize_labels
from exp.volumes import read_image as read_slices

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
VOLUME_SUFFIXES = (".nii.gz", ".nii")
MONTAGE = 3  # rows and columns of slices in the overlay of a volume


@dataclass(frozen=True)
class Source:
    """An input file; the name is its path below the folder given, without the suffix."""

    name: str
    path: Path

    @property
    def is_volume(self) -> bool:
        return self.path.name.lower().endswith(VOLUME_SUFFIXES)


@dataclass(frozen=True)
class Predictor:
    """A trained network under several rules, with what its data set says of images and label files.

    channels: 3 (RGB images) or 1 (slices of volumes). window: the values that one channel is clipped to. slice_size:
    (H, W) that slices are resized to before the network sees them, as in training. rescale: intensities are rescaled
    per volume, as in training.
    """

    model: nn.Module
    inference: Inference
    normalize: Callable[[Tensor], Tensor]
    rules: Mapping[str, Rule]
    device: torch.device
    classes: tuple[str, ...]
    palette: Palette
    format: MaskFormat
    channels: int
    window: tuple[float, float] | None
    slice_size: tuple[int, int] | None
    rescale: bool

    def decide(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """(H, W, channels) uint8 or int16 -> (H, W) labels a rule."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        prob = self.inference(self.model, self.normalize(pixels.to(self.device)))
        return {name: rule(prob)[0].cpu().numpy() for name, rule in self.rules.items()}

    def read(self, source: Source) -> np.ndarray | Volume:
        """A source -> its pixels, or the grid of its volume; InputError for what this network cannot take."""
        if source.is_volume and self.channels != 1:
            raise InputError(f"{source.path}: got a volume, expected an image: the network was trained on RGB images")
        if not source.is_volume and self.channels != 3:
            raise InputError(
                f"{source.path}: got an image, expected a NIfTI volume: the network was trained on slices of volumes"
            )
        return open_volume(source.path) if source.is_volume else read_image(source.path)

    def decide_slices(self, volume: Volume) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """A volume -> slice by slice its (H, W) values, clipped to the window, and (H, W) uint8 labels a rule."""
        for values in read_slices(volume, range(volume.num_slices), rescale=self.rescale):
            shown = values if self.window is None else values.clip(*(round(bound) for bound in self.window))
            seen = shown if self.slice_size is None else resize_image(shown, self.slice_size)
            preds = self.decide(seen[..., None])
            yield shown, {name: resize_labels(pred.astype(np.uint8), values.shape) for name, pred in preds.items()}


def list_sources(path: Path, output: Path) -> list[Source]:
    """A file, or a folder with all below it but `output` -> images and volumes by name; InputError for none."""
    if path.is_file():
        return [Source(strip_suffix(path.name), path)]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    suffixes = IMAGE_SUFFIXES + VOLUME_SUFFIXES
    found: dict[str, Source] = {}
    for file in sorted(path.rglob("*")):
        own = output.resolve() in file.resolve().parents
        if own or file.name.startswith(".") or not file.name.lower().endswith(suffixes):
            continue
        name = strip_suffix(file.relative_to(path).as_posix())
        if name in found:
            raise InputError(f"{file}: got two files of the name '{name}', expected one ({found[name].path} is there)")
        found[name] = Source(name, file)
    if not found:
        raise InputError(f"{path}: got no file of {', '.join(suffixes)}, expected images or NIfTI volumes")
    return list(found.values())


def strip_suffix(name: str) -> str:
    """A file's name or path without .nii.gz or its last suffix."""
    for suffix in VOLUME_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name[: -len(Path(name).suffix)] if Path(name).suffix else name


@dataclass(frozen=True)
class Output:
    """Where files go: <folder>/masks/<rule>/<name>.{png,nii.gz}, overlays/<rule>/<name>.png and classes.json."""

    folder: Path

    def mask(self, rule: str, source: Source) -> Path:
        return self.folder / "masks" / rule / f"{source.name}{'.nii.gz' if source.is_volume else '.png'}"

    def overlay(self, rule: str, source: Source) -> Path:
        return self.folder / "overlays" / rule / f"{source.name}.png"

    @property
    def classes(self) -> Path:
        return self.folder / "classes.json"

    def check_free(self, sources: Sequence[Source], rules: Sequence[str], classes: str) -> None:
        """InputError for the first file that would be overwritten, or a classes.json of other classes."""
        for path in (kind(rule, source) for kind in (self.mask, self.overlay) for rule in rules for source in sources):
            if path.exists():
                raise InputError(f"{path}: got a file there already, expected none (--overwrite replaces it)")
        if self.classes.exists() and self.classes.read_text(encoding="utf-8") != classes:
            raise InputError(f"{self.classes}: got other classes, expected those of the checkpoint, or --overwrite")


def predict_files(predictor: Predictor, sources: Sequence[Source], output: Output) -> None:
    """Write masks and overlays of every source, and classes.json; all sources are looked at before the first."""
    for source in tqdm(sources, desc="reading", leave=False):
        predictor.read(source)  # a damaged file should not wait for its turn
    output.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(output.classes, describe_classes(predictor))
    for source in tqdm(sources, desc="predicting", unit="file", leave=False):
        pixels = predictor.read(source)
        if isinstance(pixels, Volume):
            _predict_volume(predictor, source, pixels, output)
            continue
        for rule, label in predictor.decide(pixels).items():
            predictor.format.save_png(predictor.format.encode(label), output.mask(rule, source))
            _save_picture(blend_labels(pixels, label, predictor.palette), output.overlay(rule, source))


def _predict_volume(predictor: Predictor, source: Source, volume: Volume, output: Output) -> None:
    """One volume -> a label volume on its grid a rule, and overlays of slices from all over the foreground."""
    shown, labels = [], {rule: [] for rule in predictor.rules}
    for values, preds in predictor.decide_slices(volume):
        shown.append(values)
        for rule, label in preds.items():
            labels[rule].append(label)
    found = [i for i in range(volume.num_slices) if any(labels[rule][i].any() for rule in labels)]
    found = found or list(range(volume.num_slices))
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(len(found), MONTAGE**2)).round().astype(int)]
    window = predictor.window or (min(v.min() for v in shown), max(v.max() for v in shown))
    for rule, slices in labels.items():
        values = {i: predictor.format.encode(label) for i, label in enumerate(slices)}
        save_volume(values, volume, output.mask(rule, source))
        tiles = [blend_labels(show_values(shown[i], window), slices[i], predictor.palette) for i in chosen]
        _save_picture(montage(tiles), output.overlay(rule, source))


def montage(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 slices, MONTAGE**2 at most -> one picture, MONTAGE in a row, enlarged where they are small."""
    width, height = tile_size(*tiles[0].shape[:2])
    rows = -(-len(tiles) // MONTAGE)
    picture = np.full((rows * height, min(len(tiles), MONTAGE) * width, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // MONTAGE * height, i % MONTAGE * width
        resized = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
        picture[top : top + height, left : left + width] = resized
    return picture


def _save_picture(picture: np.ndarray, path: Path) -> None:
    with whole_file(path) as temporary:
        Image.fromarray(picture).save(temporary)


def describe_classes(predictor: Predictor) -> str:
    """Classes -> JSON: the value in masks, the name and the colour of each."""
    rows = [
        {"value": int(value), "name": name, "colour": [int(v) for v in colour]}
        for value, name, colour in zip(predictor.format.values, predictor.classes, predictor.palette)
    ]
    return json.dumps(rows, indent=1) + "\n"


def generate_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Colours for classes whose data set has none: black first, then hues a golden angle apart."""
    hues = [colorsys.hsv_to_rgb(0.618034 * c % 1, 0.65 + 0.35 * (c % 2), 0.95) for c in range(num_classes - 1)]
    return [(0, 0, 0), *(tuple(round(255 * v) for v in rgb) for rgb in hues)]


def build_predictor(
    path: Path, predict: Sequence[PredictConfig], test: TestConfig | None, device: torch.device
) -> Predictor:
    """A checkpoint, the rules, and how images become probabilities (None: as the checkpoint's run was judged)."""
    checkpoint = load_checkpoint(path)
    data = _config_of(checkpoint, "data", DataConfig)
    test = (test or _config_of(checkpoint, "test", TestConfig)).resolved(data.crop_size)
    known, facts = DATASETS.get(data.dataset), VOLUMES.get(data.dataset)
    num_classes = len(checkpoint.classes)
    palette, label_map = generate_palette(num_classes), {}
    if known is not None and list(known.classes) == checkpoint.classes:
        palette, label_map = known.palette, known.label_map
    channels = known.channels if known is not None else 1 if data.window else 3
    model = _load_model(checkpoint, channels, test.weights).to(device).eval()
    return Predictor(
        model=model if test.amp == "off" else Autocast(model, test.amp, device),
        inference=build_inference(test),
        normalize=build_normalize(data),
        rules={c.name: build_rule(c, num_classes) for c in predict},
        device=device,
        classes=tuple(checkpoint.classes),
        palette=palette,
        format=mask_format(num_classes, palette, label_map),
        channels=channels,
        window=data.window,
        slice_size=facts.size if facts else None,
        rescale=facts.rescale if facts else False,
    )


def _load_model(checkpoint: Checkpoint, channels: int, weights: str) -> nn.Module:
    config = _config_of(checkpoint, "model", ModelConfig)
    model = build_model(config, len(checkpoint.classes), channels, pretrained=False)
    load_weights(model, checkpoint, checkpoint.config["model"], checkpoint.classes, weights)
    channels_last = checkpoint.config["schedule"]["channels_last"]
    return model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _config_of(checkpoint: Checkpoint, group: str, cls: type) -> Any:
    return build_dataclass(cls, checkpoint.config[group], checkpoint.path, {})
