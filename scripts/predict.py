"""Masks and overlays for images of your own, from a checkpoint alone: it knows its network, classes and window.

    python scripts/predict.py output/<run>/checkpoints/iter_0040000.pt street.jpg --predict_yaml argmax rankseg_rma
    python scripts/predict.py CHECKPOINT photos/ --output_dir predicted --overwrite
    python scripts/predict.py CHECKPOINT scan.nii.gz --predict_yaml rankseg_rma
    python scripts/predict.py published/torchvision_voc:deeplabv3_resnet101 photos/ --predict_yaml rankseg_levelset

The input is an image, a NIfTI volume, or a folder of them with all its subfolders. Images have any size: a window
slides over them, and they are taken as viewers show them (turned as their EXIF says). A volume is cut into axial
slices, which are turned, windowed and resized as in training. Thresholds of a case or data set are those of all slices
that are given, where an evaluation has the slices of its data set alone. Below --output_dir:

    masks/<rule>/<name>.png        labels as a palette PNG, in the values of the data set's own label files
    masks/<rule>/<name>.nii.gz     labels of a volume on its own grid
    overlays/<rule>/<name>.png     the labels' colours over the image; of a volume, nine slices
    classes.json                   value, name and colour of each class

Files that are there already are not replaced without --overwrite, but for those of the same command that was
interrupted: unfinished.json says so until all is written.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import add_device, add_overrides, add_rules, build_script_parser, check_folder
from exp.config.experiment import load_groups, require_published
from exp.config.published import is_published
from exp.runtime.errors import InputError, run_and_report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    check_folder("--output_dir", args.output_dir)
    for text in args.overrides:
        if text.startswith("test.") and not args.test_yaml and not is_published(args.checkpoint):
            raise InputError(
                f"--set {text}: expected together with --test_yaml NAME (without it, the checkpoint's run says how "
                "images become probabilities)"
            )
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = build_script_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a file of <run>/checkpoints/, or a network that others trained: "
        "published/NAME[:VARIANT] of configs/model, or the path of such a YAML")  # fmt: skip
    add("input", type=Path, metavar="INPUT", help="an image, a NIfTI volume, or a folder of them")
    add_rules(parser, ["rankseg_rma"])
    add("--test_yaml", metavar="NAME", help="configs/test/NAME.yaml (default: how the checkpoint's run was evaluated)")
    add_overrides(parser)
    add("--output_dir", type=Path, default=Path("predicted"), metavar="DIR", help="default: ./predicted")
    add("--overwrite", action="store_true", help="replace files of the same names")
    add_device(parser)
    return parser


def main() -> None:
    args = parse_args()
    published = is_published(args.checkpoint)
    test_yaml = args.test_yaml or ("test_iou" if published else None)
    groups = {"predict": args.predict_yaml} | ({"test": [test_yaml]} if test_yaml else {})
    groups |= {"model": [args.checkpoint]} if published else {}
    configs = load_groups(groups, args.overrides)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from exp.predict_images import (
        build_predictor,
        build_published_predictor,
        check_free,
        describe_command,
        is_unfinished,
        list_sources,
        predict_files,
    )
    from exp.runtime.distributed import pick_device  # PyTorch and all that stands on it come in only now

    sources = list_sources(args.input, args.output_dir)
    rest = (configs["predict"], configs.get("test"), pick_device(args.device))
    if published:
        predictor = build_published_predictor(require_published(configs["model"], args.checkpoint), *rest)
    else:
        predictor = build_predictor(Path(args.checkpoint), *rest)
    origin = args.checkpoint if published else str(Path(args.checkpoint).resolve())
    command = describe_command(predictor, configs["predict"], origin, sources)
    if not (args.overwrite or is_unfinished(args.output_dir, command)):
        check_free(args.output_dir, sources, predictor)
    predict_files(predictor, sources, args.output_dir, command)
    print(f"{len(sources)} file(s): {args.output_dir}")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
