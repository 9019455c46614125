"""Images of the user's own -> masks and overlays, from a checkpoint or a published network alone: both know their
config and their classes."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from exp.checkpoints.checkpoint import Checkpoint, load_checkpoint, load_weights, weights_checksum
from exp.config.data import DataConfig
from exp.config.evaluation import PredictConfig, TestConfig
from exp.config.experiment import load_groups
from exp.config.model import ModelConfig
from exp.config.published import PublishedConfig
from exp.config.strict_yaml import build_dataclass
from exp.config.training import ScheduleConfig
from exp.data.base import numbered_colours, show_values
from exp.data.decode import read_image
from exp.data.prepare.facts import VolumeFacts
from exp.data.registry import DATASETS, build_normalize, dataset_facts
from exp.data.transforms import Normalize
from exp.evaluation.inference import Inference, build_inference
from exp.evaluation.masks import MaskFormat, mask_format, save_volume
from exp.evaluation.pictures import Palette, blend_labels, tile_size
from exp.evaluation.temperature import load_temperature
from exp.files.atomic import replacing, write_atomically
from exp.files.images import FORMATS
from exp.files.nifti import Volume, open_volume, resize_image, resize_labels
from exp.files.nifti import read_image as read_slices
from exp.files.paths import visible_files
from exp.models import build_model
from exp.models.published import PROBE, build_published, class_names
from exp.rules.pooled import PooledRule, RuleThresholds, gather_thresholds
from exp.rules.registry import Rule, bind_rules, build_rule, decide, see_padding
from exp.runtime.errors import InputError, decoding
from exp.runtime.progress import follow

VOLUME_SUFFIXES = (".nii.gz", ".nii")
CLASSES = "classes.json"
UNFINISHED = "unfinished.json"  # while the program is at work, and where it was interrupted
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

    channels: of an image, 3 (RGB) or 1. window: of one channel, the values that become -1 and 1. volumes: how the
    slices it was trained on were made, and in which orientation; None: it was trained on images.
    """

    model: nn.Module
    inference: Inference
    normalize: Callable[[Tensor], Tensor]
    rules: Mapping[str, Rule | PooledRule]
    device: torch.device
    classes: tuple[str, ...]
    palette: Palette
    format: MaskFormat
    channels: int
    window: tuple[float, float] | None
    volumes: VolumeFacts | None

    def probabilities(self, image: np.ndarray) -> Tensor:
        """(H, W, channels) uint8 or int16 -> (1, C, H, W) float32, with the padding of the window if a rule sees it."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        return self.inference(self.model, self.normalize(pixels.to(self.device)))

    def decide(self, image: np.ndarray, source: Source, thresholds: RuleThresholds) -> dict[str, np.ndarray]:
        """(H, W, channels) pixels of a source -> (H, W) labels by rule, the pooled ones under their thresholds."""
        size, whole = image.shape[:2], self.probabilities(image)
        prob, place = self.inference.inside(whole, *size), self.inference.place(*size)
        rules = bind_rules(self.rules, thresholds, source.name)
        return {name: decide(rule, whole, prob, place).cpu().numpy() for name, rule in rules.items()}

    def read(self, source: Source) -> np.ndarray | Volume:
        """A source -> its pixels, or the grid of its volume; InputError for what this network cannot take."""
        if source.is_volume != (self.volumes is not None):
            got, expected = ("a volume", "an image") if source.is_volume else ("an image", "a NIfTI volume")
            raise InputError(f"{source.path}: got {got}, expected {expected}, as the network was trained on")
        if source.is_volume:
            return open_volume(source.path, self.volumes.orientation)
        return read_image(source.path, self.channels)

    def show(self, image: np.ndarray) -> np.ndarray:
        """(H, W, channels) image -> (H, W, 3) uint8 for pictures."""
        return image if self.channels == 3 else show_values(image[..., 0], self.window)

    def slices(self, volume: Volume) -> Iterator[np.ndarray]:
        """A volume -> its slices in order, (H, W) int16 values."""
        yield from read_slices(volume, range(volume.num_slices), rescale=self.volumes.rescale)

    def resize(self, values: np.ndarray) -> np.ndarray:
        """(H, W) values of a slice -> (H', W', 1), as the network sees it: clipped to the window after all else."""
        low, high = (round(bound) for bound in self.window)
        return resize_image(values, self.volumes.size or values.shape).clip(low, high)[..., None]

    def maps(self, sources: Sequence[Source]) -> Iterator[tuple[Tensor, str]]:
        """The probabilities of every image and slice, and its source's name: what pooled rules want to see first."""
        for source in tqdm(sources, desc="gathering thresholds", unit="file", leave=False, disable=None):
            pixels = self.read(source)
            images = map(self.resize, self.slices(pixels)) if isinstance(pixels, Volume) else [pixels]
            for image in images:
                yield self.inference.inside(self.probabilities(image), *image.shape[:2]), source.name


def list_sources(path: Path, output: Path) -> list[Source]:
    """A file, or a folder with all below it but `output` -> images and volumes by name; InputError for none."""
    if path.is_file():
        return [Source(strip_suffix(path.name), path)]
    suffixes = (*FORMATS, *VOLUME_SUFFIXES)
    found: dict[str, Source] = {}
    for file in visible_files(path, "**/*.*"):
        if not file.name.lower().endswith(suffixes) or output.resolve() in file.resolve().parents:
            continue
        source = Source(strip_suffix(file.relative_to(path).as_posix()), file)
        if (other := found.setdefault(source.name, source)) != source:
            raise InputError(f"{file}: got two files of the name '{source.name}', expected one ({other.path} is there)")
    if not found:
        raise InputError(f"{path}: got no file of {', '.join(suffixes)}, expected images or NIfTI volumes")
    return list(found.values())


def strip_suffix(name: str) -> str:
    """A file's name or path without .nii.gz or its last suffix."""
    return re.sub(r"(?i)(\.nii(?=\.gz))?\.[^./]*$", "", name)


def mask_path(folder: Path, rule: str, source: Source) -> Path:
    return folder / "masks" / rule / f"{source.name}{'.nii.gz' if source.is_volume else '.png'}"


def overlay_path(folder: Path, rule: str, source: Source) -> Path:
    return folder / "overlays" / rule / f"{source.name}.png"


def describe_command(
    predictor: Predictor, predict: Sequence[PredictConfig], checkpoint: str, sources: Sequence[Source]
) -> str:
    """What decides which files are written, and what is in them -> JSON."""
    facts = {
        "checkpoint": checkpoint,
        "weights_checksum": weights_checksum(predictor.model),
        "rules": [asdict(config) for config in predict],
        "inference": repr(predictor.inference),
        "sources": {source.name: str(source.path.resolve()) for source in sources},
    }
    return json.dumps(facts, indent=1) + "\n"


def is_unfinished(folder: Path, command: str) -> bool:
    """Whether the same command was begun there and not finished: what lies at the places of its files is its own."""
    path = folder / UNFINISHED
    return path.is_file() and path.read_bytes() == command.encode()


def check_free(folder: Path, sources: Sequence[Source], predictor: Predictor) -> None:
    """InputError for the first file that would be overwritten, or a classes.json of other classes."""
    pairs = [(rule, source) for rule in predictor.rules for source in sources]
    paths = (path_of(folder, *pair) for path_of in (mask_path, overlay_path) for pair in pairs)
    if taken := next(filter(Path.exists, paths), None):
        raise InputError(f"{taken}: got a file there already, expected none (--overwrite replaces it)")
    classes = folder / CLASSES
    if classes.exists() and classes.read_bytes() != describe_classes(predictor).encode():
        raise InputError(f"{classes}: got other classes, expected those of the checkpoint, or --overwrite")


def predict_files(predictor: Predictor, sources: Sequence[Source], folder: Path, command: str) -> None:
    """Write masks and overlays of every source, and classes.json; all sources are looked at before the first.

    command: of describe_command; it stands in UNFINISHED until all is written.
    """
    for source in tqdm(sources, desc="reading", leave=False, disable=None):
        predictor.read(source)  # a damaged file should not wait for its turn
    write_atomically(folder / UNFINISHED, command)
    write_atomically(folder / CLASSES, describe_classes(predictor))
    thresholds = gather_thresholds(predictor.rules, predictor.maps(sources))
    for source in follow(sources, "predicting", "file"):
        pixels = predictor.read(source)
        if isinstance(pixels, Volume):
            _predict_volume(predictor, source, pixels, thresholds, folder)
            continue
        for rule, label in predictor.decide(pixels, source, thresholds).items():
            predictor.format.save_png(predictor.format.values[label], mask_path(folder, rule, source))
            picture = blend_labels(predictor.show(pixels), label, predictor.palette)
            _save_picture(picture, overlay_path(folder, rule, source))
    (folder / UNFINISHED).unlink()


def _predict_volume(
    predictor: Predictor, source: Source, volume: Volume, thresholds: RuleThresholds, folder: Path
) -> None:
    """One volume -> a label volume on its grid per rule, and overlays of slices from all over the foreground."""
    shown, labels = [], {rule: [] for rule in predictor.rules}
    for values in predictor.slices(volume):
        shown.append(values)
        for rule, label in predictor.decide(predictor.resize(values), source, thresholds).items():
            labels[rule].append(resize_labels(label.astype(np.uint8), values.shape))
    found = [i for i in range(volume.num_slices) if any(labels[rule][i].any() for rule in labels)]
    found = found or list(range(volume.num_slices))
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(len(found), MONTAGE**2)).round().astype(int)]
    for rule, slices in labels.items():
        values = {i: predictor.format.values[label] for i, label in enumerate(slices)}
        save_volume(values, volume, mask_path(folder, rule, source))
        tiles = [blend_labels(predictor.show(shown[i][..., None]), slices[i], predictor.palette) for i in chosen]
        _save_picture(montage(tiles), overlay_path(folder, rule, source))


def montage(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 slices, MONTAGE**2 at most -> one picture, MONTAGE in a row, enlarged where they are small."""
    size = tile_size(*tiles[0].shape[:2])
    resized = [np.array(Image.fromarray(tile).resize(size, Image.Resampling.NEAREST)) for tile in tiles]
    grid = make_grid(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2), MONTAGE, padding=0, pad_value=255)
    return grid.permute(1, 2, 0).numpy()


def _save_picture(picture: np.ndarray, path: Path) -> None:
    with replacing(path, durable=False) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def describe_classes(predictor: Predictor) -> str:
    """Classes -> JSON: the value in masks, the name and the colour of each."""
    rows = [
        {"value": int(value), "name": name, "colour": [int(v) for v in colour]}
        for value, name, colour in zip(predictor.format.values, predictor.classes, predictor.palette)
    ]
    return json.dumps(rows, indent=1) + "\n"


def build_predictor(
    path: Path, predict: Sequence[PredictConfig], test: TestConfig | None, device: torch.device
) -> Predictor:
    """A checkpoint, the rules, and how images become probabilities (None: as the checkpoint's run was evaluated)."""
    checkpoint = load_checkpoint(path)
    data = _config_of(checkpoint, "data", DataConfig)
    test = (test or _config_of(checkpoint, "test", TestConfig)).resolved(data.crop_size)
    facts = _facts_of(data)
    classes, volumes = list(facts["classes"]), facts["volumes"]
    if volumes is not None:
        if checkpoint.orientation is None:
            said = (
                f"warning: {path}: does not say in which orientation its volumes were, taken as {volumes.orientation}"
            )
            print(said, file=sys.stderr, flush=True)
        volumes = replace(volumes, orientation=checkpoint.orientation or volumes.orientation)
    if volumes is None:
        _refuse_cases(predict)
    with decoding(path, "a checkpoint of a network that can be built"):  # its config may say anything
        model = build_model(
            _config_of(checkpoint, "model", ModelConfig), len(classes), facts["channels"], pretrained=False
        )
    load_weights(model, checkpoint, checkpoint.config["model"], classes, test.weights)
    channels_last = _config_of(checkpoint, "schedule", ScheduleConfig).channels_last
    model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format).eval()
    if test.temperature == "fitted":
        fitted = path.resolve().parents[1] / "results" / "temperature.json"  # of the run that has the checkpoint
        test = replace(test, temperature=load_temperature(fitted, weights_checksum(model)))
    rules = {c.name: build_rule(c, len(classes), classes) for c in predict}
    return Predictor(
        model=model,
        inference=build_inference(test, see_padding(rules.values())),
        normalize=build_normalize(data),
        rules=rules,
        device=device,
        classes=facts["classes"],
        palette=facts["palette"],
        format=mask_format(len(classes), facts["palette"], facts["label_map"]),
        channels=facts["channels"],
        window=facts["window"],
        volumes=volumes,
    )


def _facts_of(data: DataConfig) -> dict[str, Any]:
    """What a data set says of images and label files: the YAML where it says so, or else the code."""
    names = ("classes", "palette", "label_map", "channels", "window", "volumes")
    return {name: getattr(DATASETS[data.dataset], name, None) for name in names} | dataset_facts(data)


def _refuse_cases(predict: Sequence[PredictConfig]) -> None:
    for config in predict:
        if config.scope == "case":
            raise InputError(f"--predict_yaml {config.name}: got a network of images, expected one of volumes")


def build_published_predictor(
    config: PublishedConfig, predict: Sequence[PredictConfig], test: TestConfig, device: torch.device
) -> Predictor:
    """A published network and the rules; windows and sizes are its owner's where the test YAML has none.

    Its classes, and colours and label values, are those of the data set that its YAML names, or its own.
    """
    _refuse_cases(predict)
    test = config.test(test).resolved(PROBE)
    if test.temperature == "fitted":
        raise InputError("test.temperature: got fitted, expected a number with a network that others trained")
    classes, label_map = tuple(class_names(config)), {}
    palette = numbered_colours(len(classes))
    if config.data is not None:
        facts = _facts_of(load_groups({"data": [config.data]}, ())["data"])
        classes, palette, label_map = facts["classes"], facts["palette"], facts["label_map"]
    model = build_published(config, classes).to(device).eval()
    rules = {c.name: build_rule(c, len(classes), list(classes)) for c in predict}
    return Predictor(
        model=model,
        inference=build_inference(test, see_padding(rules.values())),
        normalize=Normalize(tuple(255 * m for m in config.mean), tuple(255 * s for s in config.std)),
        rules=rules,
        device=device,
        classes=classes,
        palette=palette,
        format=mask_format(len(classes), palette, label_map),
        channels=3,
        window=None,
        volumes=None,
    )


def _config_of(checkpoint: Checkpoint, group: str, cls: type) -> Any:
    values = checkpoint.config.get(group) if isinstance(checkpoint.config, dict) else None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{checkpoint.path}: got no {group} settings, expected a checkpoint of this program")
    return build_dataclass(cls, values, checkpoint.path, {})
