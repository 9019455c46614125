"""A network, with or without a rule, -> one file for other programs, compared with PyTorch before it is kept."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from exp.files.atomic import replacing
from exp.runtime.errors import InputError

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # of the format onnx: to write it, and to run what was written
MAX_DIFFERENCE = 1e-3  # of logits, as a share of the largest; kernels of onnxruntime come to some 1e-6
MAX_PIXELS = 1e-3  # share of labels that may differ: logits that are all but equal are decided by their rounding
INPUT, LOGITS, LABEL = "image", "logits", "label"  # names in the graph


class Graph(nn.Module):
    """(B, channels, H, W) normalised images -> (B, C, H, W) logits or, with a rule, (B, H, W) int64 labels.

    rule: probabilities -> labels. The softmax is of logits / temperature, in float32, as in an evaluation.
    """

    def __init__(
        self, model: nn.Module, rule: Callable[[Tensor], Tensor] | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.rule, self.temperature = model, rule, temperature

    def forward(self, image: Tensor) -> Tensor:
        logits = self.model(image)
        if self.rule is None:
            return logits
        return self.rule((logits.float() / self.temperature).softmax(dim=1))

    @property
    def output(self) -> str:
        return LOGITS if self.rule is None else LABEL


def require_packages(kind: str) -> None:
    """InputError if a package that writes or runs this format is missing."""
    for name in PACKAGES if kind == "onnx" else ():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise InputError(
                f"--format onnx: got no package {name}, expected it: pip install {' '.join(PACKAGES)}"
            ) from None


@torch.no_grad()
def export_graph(
    graph: Graph, reference: Graph, path: Path, kind: str, shape: tuple[int, int, int], free_batch: bool
) -> str:
    """Write the graph of images of one shape to `path`, and run it from there -> how far it is from `reference`.

    reference: the same network with the ordinary form of the rule. kind: of FORMATS. shape: (channels, height, width).
    free_batch: any number of images at a time, else one. InputError where it cannot be traced, or differs from the
    reference by more than rounding does; then there is no file.
    """
    images = make_images(2 if free_batch else 1, shape)
    shapes = ({0: torch.export.Dim("batch")},) if free_batch else None
    with replacing(path, suffix=FORMATS[kind]) as temporary:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the libraries' warnings, of what they will change
                program = torch.export.export(graph, (images,), dynamic_shapes=shapes)
                _save(program, temporary, kind, graph.output)
        except OSError:  # of the disk
            raise
        except Exception as error:  # of any kind: what a network does that cannot be traced is not foreseen
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{path}: got a network that cannot be traced ({type(error).__name__}: {reason})"
            ) from error
        run = _open(temporary, kind)
        found = [_compare(reference(batch), run(batch), path) for batch in (images, images[:1].flip(-1))]
    return found[0]


def make_images(number: int, shape: tuple[int, int, int]) -> Tensor:
    """Normalised images of no meaning, (number, *shape): soft regions with noise over them, the same every time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(number, shape[0], 6, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, shape[1:], mode="bilinear", align_corners=False)
    return 1.5 * smooth + 0.2 * torch.randn(number, *shape, generator=generator)


def _save(program: torch.export.ExportedProgram, path: Path, kind: str, output: str) -> None:
    if kind == "torch_export":
        torch.export.save(program, path)
        return
    model = torch.onnx.export(program, input_names=[INPUT], output_names=[output], dynamo=True, verbose=False)
    model.save(path, external_data=False)


def _open(path: Path, kind: str) -> Callable[[Tensor], np.ndarray]:
    """A file that was just written -> what it computes on the CPU."""
    if kind == "torch_export":
        module = torch.export.load(path).module()
        return lambda images: module(images).numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images.numpy()})[0]


def _compare(expected: Tensor, got: np.ndarray, path: Path) -> str:
    """What PyTorch gives and what the file gives -> their difference in words; InputError if it is too large."""
    reference = expected.numpy()
    if got.shape != reference.shape or got.dtype != reference.dtype:
        raise InputError(
            f"{path}: got {got.dtype} values of shape {got.shape} from it, expected {reference.dtype} of "
            f"{reference.shape} as PyTorch gives"
        )
    if got.dtype == np.int64:
        different = int((got != reference).sum())
        text, wrong = f"{different} of {got.size} labels differ", different > MAX_PIXELS * got.size
    else:
        difference = float(np.abs(got - reference).max() / max(1.0, np.abs(reference).max()))
        text, wrong = f"logits differ by {difference:.1e} of the largest", not difference <= MAX_DIFFERENCE
    if wrong:
        raise InputError(f"{path}: got a graph of other results ({text} from PyTorch's), expected the same")
    return text
