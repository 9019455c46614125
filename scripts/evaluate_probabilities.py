"""Evaluate decision rules on probability maps that another program wrote, beside label files. No network is needed.

    python scripts/evaluate_probabilities.py MAPS LABELS --predict_yaml argmax rankseg_rma --output_dir evaluated
    python scripts/evaluate_probabilities.py nnUNet_results/.../validation labelsTr --unit case --output_dir evaluated
    python scripts/evaluate_probabilities.py --true_of shapes_noisy_binary --set data.label_noise=0.2 \\
        --predict_yaml argmax rankseg_rma rankseg_exact --output_dir true

MAPS holds .npy or .npz files of (C, H, W) or (C, D, H, W) floats that sum to 1 over the C classes, LABELS a file of the
same name for each: an index image (.png, .tif), array (.npy) or volume (.nii, .nii.gz). Values 0..C-1 are classes, 255
(and --ignore_label) does not count. One map is in memory at a time, and nothing is unpickled.

nnU-Net writes its maps with --save_probabilities (v2; --save_npz in v1) beside its segmentations. Their axes are
(C, z, y, x), those of the NIfTI labels x, y, z: whether the labels have to be reversed is read off the shapes, and
where both ways fit, --label_axes reversed says it. Labels must be in the orientation in which nnU-Net read the images
(only its reader NibabelIOWithReorient turns them). Region-based models, whose classes overlap, do not sum to 1 and are
refused.

--true_of DATA_YAML takes the probabilities from which a synthetic data set draws its labels, in place of MAPS. They are
those given the scene: the image and its labels before the noise. A network sees the image alone, in which an object's
edge is blurred and colours overlap, so what a rule reaches here bounds what it reaches there. With two classes
`rankseg_exact` and `rankseg_exact_iou` are the Bayes decisions for the image's Dice and IoU. With several classes that
exclude each other no rule here is the Bayes decision for mDiceI or mIoUI (argmax is, for the accuracy).

Written to --output_dir: results/ as an evaluation by exp/main.py writes it (<rule>.json, <rule>.csv with a row per
unit, comparison.json, calibration.json). A unit is an image; of a volume each slice, averaged within the volume first
(--unit slice), or the whole volume (--unit case). With --true_of each JSON says `"probabilities": "true"`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import add_overrides, add_rules, build_script_parser, check_folder
from exp.config.data import DataConfig
from exp.config.experiment import load_groups
from exp.runtime.errors import InputError, run_and_report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if (args.prob_dir is None, args.label_dir is None) != (bool(args.true_of),) * 2:
        raise InputError("MAPS LABELS: expected both folders, or --true_of DATA_YAML in their place")
    if not 0 <= args.ignore_label <= 255:
        raise InputError(f"--ignore_label: got {args.ignore_label}, expected a value in 0..255")
    if not 0 <= args.tolerance < 1:
        raise InputError(f"--tolerance: got {args.tolerance}, expected a value in [0, 1)")
    check_folder("--output_dir", args.output_dir)
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = build_script_parser(__doc__)
    add = parser.add_argument
    add("prob_dir", type=Path, nargs="?", metavar="MAPS", help="folder of .npy and .npz probability maps")
    add("label_dir", type=Path, nargs="?", metavar="LABELS", help="folder of label files of the same names")
    add("--true_of", metavar="DATA_YAML", help="a data set whose probabilities are known, in place of MAPS LABELS")
    add_rules(parser, ["argmax", "rankseg_rma"])
    add_overrides(parser)
    add("--output_dir", type=Path, required=True, metavar="DIR")
    add("--unit", choices=("slice", "case"), default="slice", help="what is decided and scored at a time in a volume")
    add("--slice_axis", type=int, choices=(0, 1, 2), default=0, help="of D, H, W, where slices lie (default 0)")
    add("--label_axes", choices=("auto", "same", "reversed"), default="auto", help="beside those of the map")
    add("--key", metavar="NAME", help="the array of .npz files (default: probabilities, softmax, or the only one)")
    add("--ignore_label", type=int, default=255, metavar="N", help="a label value that does not count, besides 255")
    add("--tolerance", type=float, default=2e-3, help="how far a pixel's sum may be off from 1 (default 0.002)")
    add("--classes", nargs="+", metavar="NAME", help="names of the classes for the tables (default: 0 1 2 ...)")
    add("--metric", choices=("mIoUI", "mDiceI", "mAccI"), default="mDiceI", help="by which the rules are compared")
    return parser


def main() -> None:
    args = parse_args()
    true = {"data": [args.true_of]} if args.true_of else {}
    configs = load_groups({**true, "predict": args.predict_yaml}, args.overrides)
    units, classes, origin, config = open_true(args, configs["data"]) if args.true_of else open_files(args)
    from exp.evaluation.probability_maps import evaluate_maps
    from exp.evaluation.results import report_results
    from exp.provenance import describe_code
    from exp.rules.registry import build_rule  # PyTorch comes in only now

    predict = configs["predict"]
    names = classes if args.classes or args.true_of else None  # the numbers of classes are no names
    rules = {c.name: build_rule(c, len(classes), names) for c in predict}
    results, calibration = evaluate_maps(units, rules, classes)
    contexts = [{**origin, **describe_code(), "config": {**config, "predict": asdict(c)}} for c in predict]
    folder = args.output_dir / "results"
    print(report_results(results, folder, contexts, metric=args.metric, calibration=calibration))
    print(f"results: {folder}")


def open_files(args: argparse.Namespace) -> tuple[Callable, Sequence[str], dict, dict]:
    """MAPS and LABELS -> what reads their units, the classes, and what results say of their origin and config."""
    from exp.evaluation.probability_maps import MapReader, pair_files, read_units

    reader = MapReader(args.key, args.unit, args.slice_axis, args.label_axes, args.ignore_label, args.tolerance)
    files = pair_files(args.prob_dir, args.label_dir)
    num_classes = len(reader.read_map(files[0][0]))
    classes = args.classes or [str(c) for c in range(num_classes)]
    if len(classes) != num_classes:
        raise InputError(f"--classes: got {len(classes)} names, expected {num_classes} as {files[0][0]} has")
    maps = {"prob_dir": str(args.prob_dir), "label_dir": str(args.label_dir), "files": len(files), **asdict(reader)}
    return partial(read_units, files, reader), classes, {"maps": maps}, {}


def open_true(args: argparse.Namespace, data: DataConfig) -> tuple[Callable, Sequence[str], dict, dict]:
    """The same of a data set's own probabilities."""
    if data.label_noise is None:  # told before anything heavy is imported
        raise InputError(
            f"--true_of {args.true_of}: got the data set {data.dataset}, expected one whose true probabilities are "
            "known: shapes_noisy or shapes_noisy_binary"
        )
    if data.test_crop:
        raise InputError(f"data.test_crop: got {list(data.test_crop)}, expected null: whole images are evaluated")
    from exp.data.registry import build_dataset
    from exp.evaluation.probability_maps import true_units

    dataset = build_dataset(data, None, "val")
    origin = {"probabilities": "true", "metric": args.metric}
    return partial(true_units, dataset), dataset.classes, origin, {"data": asdict(data)}


if __name__ == "__main__":
    sys.exit(run_and_report(main))
