"""A trained network, with or without a decision rule in it, as one file for other programs: ONNX or torch.export.

    python scripts/export.py output/<run>/checkpoints/iter_0040000.pt --format onnx
    python scripts/export.py CHECKPOINT --format onnx --predict_yaml rankseg_levelset --size 480 640
    python scripts/export.py CHECKPOINT --format torch_export --predict_yaml rankseg_rma --output network.pt2

The graph takes `image`, normalised images of one size (--size; default: the window that the run was evaluated with),
float32 (B, channels, H, W). It gives `logits`, float32 (B, classes, H, W), or with --predict_yaml `label`, int64
(B, H, W): the softmax, by the run's temperature, and the rule are in it then. Larger images are the caller's to cut
into windows; a rule sees the image that it is given, so with a rule --size should be the size of whole images. B is
free, but 1 for rankseg_levelset with opt_metric: dice.

Rules that can be in a graph: argmax, threshold, rankseg_rma and rankseg_levelset with all their options but
sees_padding. rankseg_rma has a fixed number of passes there.

The file is run at once (ONNX by onnxruntime, on the CPU) and compared with PyTorch, the rule in its ordinary form; one
that differs by more than rounding is not kept. Beside it, FILE.json says what a caller needs: names, shapes, mean and
standard deviation (in units of the image's values), classes, rule, temperature and checkpoint.

ONNX needs three packages more: pip install onnx onnxscript onnxruntime.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.checks import MAX_CROP
from exp.config.cli import add_overrides, build_script_parser
from exp.config.evaluation import PredictConfig
from exp.config.experiment import load_groups
from exp.runtime.errors import InputError, run_and_report

IN_GRAPHS = ("argmax", "threshold", "rankseg_rma", "rankseg_levelset")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.size and not all(1 <= side <= MAX_CROP for side in args.size):
        raise InputError(f"--size: got {args.size}, expected a height and a width of 1..{MAX_CROP}")
    if args.overrides and not args.predict_yaml:
        raise InputError(f"--set {args.overrides[0]}: expected together with --predict_yaml NAME")
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = build_script_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of <run>/checkpoints/")
    add("--format", choices=("onnx", "torch_export"), required=True)
    add("--predict_yaml", metavar="NAME", help="configs/predict/NAME.yaml, the rule in the graph (default: none)")
    add_overrides(parser)
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images (default: the window of the evaluation)")
    add("--output", type=Path, metavar="FILE", help="default: beside the checkpoint, <name>[.<rule>].onnx or .pt2")
    add("--overwrite", action="store_true", help="replace FILE and FILE.json")
    return parser


def check_rule(config: PredictConfig) -> None:
    """InputError for a rule that no graph can hold."""
    if config.rule not in IN_GRAPHS:
        raise InputError(
            f"--predict_yaml {config.name}: got the rule {config.rule}, expected one that a graph can hold: "
            f"{', '.join(IN_GRAPHS)}"
        )
    if config.sees_padding:
        raise InputError(
            f"--predict_yaml {config.name}: got sees_padding=true, expected --set predict.sees_padding=false: a graph "
            "knows nothing of a window"
        )


def main() -> None:
    args = parse_args()
    config = load_groups({"predict": [args.predict_yaml]}, args.overrides)["predict"][0] if args.predict_yaml else None
    if config:
        check_rule(config)
    from exp.checkpoints.checkpoint import weights_checksum  # PyTorch comes in only now
    from exp.files.atomic import write_atomically
    from exp.models.export import FORMATS, INPUT, Graph, export_graph, require_packages
    from exp.predict_images import build_predictor
    from exp.runtime.distributed import pick_device
    from rankseg_rma import RankSEG

    require_packages(args.format)
    name = f"{args.checkpoint.stem}.{config.name}" if config else args.checkpoint.stem
    path = args.output or args.checkpoint.with_name(name + FORMATS[args.format])
    facts_path = path.with_name(path.name + ".json")
    for taken in filter(Path.exists, () if args.overwrite else (path, facts_path)):
        raise InputError(f"{taken}: got a file there already, expected none (--overwrite replaces it)")

    predictor = build_predictor(args.checkpoint, [config] if config else [], None, pick_device("cpu"))
    rule = predictor.rules[config.name] if config else None
    traced = rule
    if config and config.rule.startswith("rankseg_"):
        options = {key: value for key, value in config.options().items() if key != "sees_padding"}
        traced = RankSEG(config.rule, traceable=True, **options)
    temperature = predictor.inference.temperature
    if args.size is None and predictor.inference.whole:
        raise InputError("--size: got none, expected the images' height and width: the run was evaluated on whole ones")
    shape = (predictor.channels, *(args.size or predictor.inference.crop_size))
    graph = Graph(predictor.model, traced, temperature)
    free_batch = not (config and config.rule == "rankseg_levelset" and config.opt_metric == "dice")
    reference = Graph(predictor.model, rule, temperature)
    difference = export_graph(graph, reference, path, args.format, shape, free_batch)
    normalize, batch = predictor.normalize, None if free_batch else 1
    facts = {
        "format": args.format,
        "input": {"name": INPUT, "shape": [batch, *shape], "mean": normalize.mean, "std": normalize.std},
        "output": graph.output,
        "classes": predictor.classes,
        "temperature": temperature,
        "short_side": predictor.inference.short_side,  # to which the run's evaluation resized images
        "rule": {key: value for key, value in asdict(config).items() if value is not None} if config else None,
        "checkpoint": args.checkpoint.name,
        "weights_checksum": weights_checksum(predictor.model),
        "against_pytorch": difference,
    }
    write_atomically(facts_path, json.dumps(facts, indent=1) + "\n")
    print(f"{path}: {graph.output} of images of {shape[1]} x {shape[2]}; {difference} from PyTorch's")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
