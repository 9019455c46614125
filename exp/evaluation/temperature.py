"""One temperature for the logits, fitted by maximum likelihood (Guo et al., ICML 2017) on pixels of labelled images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exp.data.base import IGNORE_INDEX, SegmentationDataset
from exp.evaluation.calibration import calibration_scores, count_calibration, describe_bins
from exp.evaluation.inference import Inference
from exp.files.text import read_json
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.runtime.progress import follow

PIXELS = 2000  # of an image that are drawn: 100 images give the temperature to three digits
MAX_IMAGES = 200  # spread over the data set


@dataclass(frozen=True)
class Pixels:
    """(M, V, C) float32 logits of the V views that inference averages, and (M,) int64 labels."""

    logits: Tensor
    label: Tensor


def draw_pixels(
    model: nn.Module,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    inference: Inference,
    normalize: Callable[[Tensor], Tensor],
    seed: int,
    dist: Dist,
) -> Pixels:
    """Pixels that are not ignored, PIXELS of each image at most, drawn by (seed, index): any processes, one draw."""
    model.eval()
    drawn = {}
    for index in follow(indices[dist.rank :: dist.world_size], "drawing pixels", "img", shown=dist.is_main):
        if dist.stop:
            break
        item = dataset[index]
        label = item.label.flatten()
        places = (label != IGNORE_INDEX).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        places = places[torch.randperm(len(places), generator=generator)[:PIXELS]]
        image = normalize(item.image[None].to(dist.device))
        views = [view[0].flatten(1)[:, places.to(dist.device)].t().cpu() for view in inference.logits(model, image)]
        drawn[index] = torch.stack(views, 1).numpy(), label[places].long().numpy()
    dist.stop_if_asked("no temperature was fitted")
    parts = {index: pair for part in dist.gather(drawn) for index, pair in part.items()}
    logits, labels = (np.concatenate([parts[index][i] for index in indices]) for i in range(2))
    if not len(labels):
        raise InputError("--fit_temperature: got images without a labelled pixel, expected some")
    return Pixels(torch.from_numpy(logits), torch.from_numpy(labels))


def negative_log_likelihood(pixels: Pixels, temperature: Tensor | float) -> Tensor:
    """Mean over the pixels of -log p of their label, p averaged over the views; in float64."""
    log_prob = (pixels.logits.double() / temperature).log_softmax(-1)
    own = log_prob.gather(-1, pixels.label[:, None, None].expand(-1, log_prob.shape[1], 1))[..., 0]
    return math.log(own.shape[1]) - own.logsumexp(1).mean()


def fit(pixels: Pixels) -> float:
    """The temperature of the largest likelihood, by LBFGS over its logarithm."""
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = negative_log_likelihood(pixels, log_temperature.exp())
        loss.backward()
        return loss

    optimizer.step(closure)
    temperature = log_temperature.exp().item()
    lower, found, higher = (negative_log_likelihood(pixels, temperature * factor) for factor in (0.9, 1, 1.1))
    if not (found < lower and found < higher):
        raise InputError(
            f"--fit_temperature: got no best temperature near {temperature:.3g}, expected one: are all pixels right?"
        )
    return temperature


def scores(pixels: Pixels, temperature: float) -> dict[str, Any]:
    """NLL (nats), the calibration errors ECED and SCED (percent) and the bins of the top label of the pixels at a
    temperature."""
    prob = (pixels.logits / temperature).softmax(-1).mean(1).t()[None, :, :, None]  # as inference averages views
    counts = count_calibration(prob, pixels.label[:, None]).numpy()
    errors = calibration_scores(counts[None])
    nll = negative_log_likelihood(pixels, temperature).item()
    return {"NLL": nll, "ECED": errors["ECED"], "SCED": errors["SCED"], "top_label": describe_bins(counts[-1])}


def split_half(dataset: SegmentationDataset) -> tuple[list[int], list[int]]:
    """Every other case (image, where there are no cases) -> the indices to fit on, and the others to check on."""
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(dataset.samples):
        groups.setdefault(sample.case or sample.name, []).append(index)
    if len(groups) < 2:
        raise InputError(f"--fit_temperature val-part: got {len(groups)} image or case, expected 2 or more")
    parts = list(groups.values())
    first, second = ([index for part in half for index in part] for half in (parts[::2], parts[1::2]))
    return spread(first), spread(second)


def spread(indices: Sequence[int]) -> list[int]:
    """At most MAX_IMAGES of the indices, evenly spread."""
    number = min(MAX_IMAGES, len(indices))
    return [indices[i * len(indices) // number] for i in range(number)]


def describe_fit(temperature: float, fitted: Pixels, held_out: Pixels) -> dict[str, Any]:
    """What temperature.json says of a fit: the scores before and after on its own pixels and on others."""
    content: dict[str, Any] = {"temperature": temperature}
    for name, pixels in (("fitted_on", fitted), ("held_out", held_out)):
        rows = {"before": scores(pixels, 1.0), "after": scores(pixels, temperature)}
        content[name] = {"pixels": len(pixels.label), **rows}
    return content


def load_temperature(path: Path, weights_checksum: str) -> float:
    """temperature.json -> the temperature; InputError if there is none for these weights."""
    expected = "that of these weights: --test-only --fit_temperature train writes it"
    content = read_json(path, expected)
    temperature, fitted_for = content.get("temperature"), content.get("weights_checksum")
    if type(temperature) is not float or not 0 < temperature < math.inf:
        raise InputError(f"{path}: got another file (temperature {temperature!r}), expected {expected}")
    if fitted_for != weights_checksum:
        raise InputError(f"test.temperature fitted: {path}: got a temperature of other weights, expected {expected}")
    return temperature
